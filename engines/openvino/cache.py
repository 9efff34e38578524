"""Keep models that OpenVINO has compiled in a bundle's ``engines/<key>/``.

A kept model is opened in a fraction of the time that compiling takes, and computes the same bits. A damaged one is
never used; a warning in the log names it. No failure of the cache keeps an engine from running: the graph is compiled
again.
"""

from __future__ import annotations

import io
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import BundleError, LatentRTError
from ..records import EngineRecord, engine_key
from ..store import EngineStore
from .rewrite import VERSION

ENGINE = "openvino"
"""Name of the engine, and of its SDK, in a kept model's record."""

_logger = logging.getLogger("latentrt.engines.openvino")
_logger.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run.

    Attributes:
        model: OpenVINO's compiled model.
        record: Its record in the bundle; ``None`` if the bundle does not keep it.
        reused: Whether the bundle had it before.
    """

    model: Any
    record: EngineRecord | None = None
    reused: bool = False


@dataclass(frozen=True)
class ModelCache:
    """The compiled models of one graph.

    Attributes:
        store: The bundle's compiled engines.
        component: Part of the diffusion model that the graph computes.
        graph: SHA-256 (hex) of the ONNX graph file.
        weights: SHA-256 (hex) of every external weights file that the graph uses, by name.
        keep: Store a model that had to be compiled. ``False`` uses kept models and writes nothing.
        required: Raise an error if a model cannot be stored; ``False`` logs a warning.
    """

    store: EngineStore
    component: str
    graph: str
    weights: Mapping[str, str]
    keep: bool = False
    required: bool = False

    def load(
        self,
        core: Any,
        sdk: ModuleType,
        properties: Mapping[str, str],
        compile_model: Callable[[], Any],
        *,
        label: str,
        precision: str,
        shapes: Mapping[str, int],
    ) -> Opened:
        """Open the kept model that fits, or else compile one.

        Steps:
            1. The key is computed from everything that decides the compiled model: files, SDK, rewrites, precision,
               fixed lengths and processor.
            2. A sound kept model with this key is imported.
            3. If there is none, stale models for the same use are named in the log.
            4. The graph is compiled, and the result is stored if ``keep`` says so.

        Args:
            core: OpenVINO's entry point.
            sdk: The Python module ``openvino``.
            properties: OpenVINO's properties, for compiling as for importing.
            compile_model: Compiles the graph.
            label: Name of the engine in messages.
            precision: Precision that the engine computes in; a part of the key.
            shapes: Lengths that never vary, by symbol; a part of the key.

        Raises:
            OutputError: if ``required`` is set and the model cannot be stored.
            Exception: whatever ``compile_model`` raises.
        """
        # Step 1.
        facts: dict[str, Any] = {
            "engine": ENGINE,
            "sdk": ENGINE,
            "sdk_version": str(sdk.__version__),
            "precision": precision,
            "profile": {},
            # The number of threads is no part of the key: it is set when a model is imported.
            "flags": {"shapes": dict(shapes), "rewriting": VERSION},
            "target": cpu_target(core),
        }
        key = engine_key(graph=self.graph, weights=self.weights, **facts)
        # Step 2.
        record = self._find(key, label)
        if record is not None:
            try:
                model = _import(core, sdk, self.store.path(record), properties)
                return Opened(model, record, reused=True)
            except Exception as error:  # noqa: BLE001  # whatever the reason, the graph can still be compiled
                why = " ".join(str(error).split())[:300]
                _logger.warning("%s: the compiled model %s cannot be opened (%s); compiling again", label, key, why)
                record = self._discard(record, label)
        else:
            self._warn_of_stale(key, facts, label)  # step 3
        # Step 4.
        compiled = compile_model()
        if self.keep and record is None:
            record = self._add(key, compiled, label, facts)
        return Opened(compiled, record)

    def _find(self, key: str, label: str) -> EngineRecord | None:
        """Return the record of a sound model; remove a damaged one where a new one will be stored."""
        try:
            return self.store.find(key)
        except (BundleError, OSError) as error:
            _logger.warning("%s: %s; compiling again", label, error)
        if self.keep:
            try:
                return self.store.find(key, repair=True)
            except (LatentRTError, OSError) as error:
                _logger.warning("%s: the damaged model cannot be removed (%s)", label, error)
        return None

    def _discard(self, record: EngineRecord, label: str) -> EngineRecord | None:
        """Remove a model that cannot be opened, if another will be stored; return its record if it stays."""
        if not self.keep:
            return record
        try:
            self.store.discard(record.key)
        except (LatentRTError, OSError) as error:
            _logger.warning("%s: the compiled model %s cannot be removed (%s)", label, record.key, error)
            return record
        return None

    def _warn_of_stale(self, present: str, facts: Mapping[str, Any], label: str) -> None:
        """Log models that were compiled for the same use and do not fit any more, each with the reason."""
        use = {"component": self.component, **{name: facts[name] for name in ("engine", "precision")}}
        shapes = facts["flags"]["shapes"]
        for key in self._stored_keys():
            try:
                record = self.store.find(key, verify_hash=False)
            except (BundleError, OSError):
                continue  # a damaged one is logged when its own key is looked up
            if key == present or record is None or any(getattr(record, name) != use[name] for name in use):
                continue
            if (record.flags or {}).get("shapes") != shapes:
                continue
            if record.sdk_version != facts["sdk_version"]:
                reason = f"OpenVINO {record.sdk_version}, and this is {facts['sdk_version']}"
            elif record.target != facts["target"]:
                reason = f"{record.target}, and this is {facts['target']}"
            elif record.flags != facts["flags"]:
                reason = "another version of LatentRT"
            else:
                reason = "another graph"
            _logger.warning("%s: the compiled model %s is stale, it is of %s; compiling again", label, key, reason)

    def _stored_keys(self) -> list[str]:
        try:
            return self.store.stored_keys()
        except (BundleError, OSError):
            return []

    def _add(self, key: str, compiled: Any, label: str, facts: Mapping[str, Any]) -> EngineRecord | None:
        """Store a compiled model; ``None`` if that failed and ``required`` is not set."""

        def write(path: Path) -> None:
            path.write_bytes(_export(compiled))

        try:
            return self.store.add(key, write, component=self.component, file=f"{self.component}.blob", **facts)
        except Exception as error:  # a full disk, a bundle that is read only, a model without export
            if self.required:
                raise
            _logger.warning("%s: the compiled model was not kept (%s)", label, error)
            return None


def cpu_target(core: Any) -> str:
    """Describe this processor with the element types that it has instructions for: ``"x86_64 AMD EPYC: FP32 INT8"``."""
    name = core.get_property("CPU", "FULL_DEVICE_NAME")
    abilities = set(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")) - {"EXPORT_IMPORT"}
    return f"{platform.machine()} {name}: {' '.join(sorted(abilities))}"


def _export(compiled: Any) -> bytes:
    exported = compiled.export_model()
    return exported.getvalue() if isinstance(exported, io.BytesIO) else bytes(exported)


def _import(core: Any, sdk: ModuleType, path: Path, properties: Mapping[str, str]) -> Any:
    try:
        # A mapped file may have gigabytes, and is copied once: by OpenVINO, whose copy outlives the file.
        content = sdk.Tensor(np.memmap(path, np.uint8, mode="r"))
        return core.import_model(content, "CPU", dict(properties))
    except TypeError:  # OpenVINO before 2025.3 takes streams only
        return core.import_model(io.BytesIO(path.read_bytes()), "CPU", dict(properties))
