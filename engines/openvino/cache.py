"""Models that OpenVINO has compiled, kept in a bundle's ``engines/<key>/``.

A model that is there is opened in a fraction of the time that compiling takes, and computes the same bits. What is
damaged is passed over and said so in the log, never used; nothing that goes wrong here keeps an engine from running.
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

_logger = logging.getLogger("latentrt.engines.openvino")
_logger.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run.

    Attributes:
        model: OpenVINO's compiled model.
        record: Its record in the bundle; None where it is not kept.
        reused: Whether it was there already.
    """

    model: Any
    record: EngineRecord | None = None
    reused: bool = False


@dataclass(frozen=True)
class ModelCache:
    """Compiled models of one graph.

    Attributes:
        store: The bundle's engines.
        component: Part of the model that the graph computes.
        graph: SHA-256 (hex) of the ONNX graph file.
        weights: Name -> SHA-256 (hex) of every external weights file that the graph uses.
        keep: Store what had to be compiled. Otherwise what is there is used, and nothing is written.
        required: Fail where it cannot be stored, in place of a warning.
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
        """The compiled model: the one that is kept if there is one for just this, else a new one.

        Args:
            core: OpenVINO's entry point.
            sdk: The Python module.
            properties: What the model is compiled or imported with.
            compile_model: Compiles it.
            label: What messages call the engine.
            precision: What is computed in; with ``shapes`` a part of the key.
            shapes: Lengths that never vary, by symbol.

        Raises:
            OutputError: if ``required`` and it cannot be stored.
            Exception: what ``compile_model`` raises.
        """
        facts: dict[str, Any] = {
            "engine": ENGINE,
            "sdk": ENGINE,
            "sdk_version": str(sdk.__version__),
            "precision": precision,
            "profile": {},
            # Threads are no part of it: they are given to a model when it is imported.
            "flags": {"shapes": dict(shapes), "rewriting": VERSION},
            "target": cpu_target(core),
        }
        key = engine_key(graph=self.graph, weights=self.weights, **facts)
        record = self._find(key, label)
        if record is not None:
            try:
                model = _import(core, sdk, self.store.path(record), properties)
                return Opened(model, record, reused=True)
            except Exception as error:  # noqa: BLE001  # whatever it is, the graph can still be compiled
                why = " ".join(str(error).split())[:300]
                _logger.warning("%s: the compiled model %s cannot be opened (%s); compiling again", label, key, why)
                record = self._discard(record, label)
        else:
            self._tell_stale(key, facts, label)
        compiled = compile_model()
        if self.keep and record is None:
            record = self._add(key, compiled, label, facts)
        return Opened(compiled, record)

    def _find(self, key: str, label: str) -> EngineRecord | None:
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
        """Make room for a sound model, where one is to be kept."""
        if not self.keep:
            return record
        try:
            self.store.discard(record.key)
        except (LatentRTError, OSError) as error:
            _logger.warning("%s: the compiled model %s cannot be removed (%s)", label, record.key, error)
            return record
        return None

    def _tell_stale(self, present: str, facts: Mapping[str, Any], label: str) -> None:
        """Name models that were compiled for the same use and do not fit any more."""
        use = {"component": self.component, **{name: facts[name] for name in ("engine", "precision")}}
        shapes = facts["flags"]["shapes"]
        for key in self._stored_keys():
            try:
                record = self.store.find(key, verify_hash=False)
            except (BundleError, OSError):
                continue  # a damaged one is named where it is asked for
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
    """This processor, and the element types that it has instructions for, e.g. ``"x86_64 AMD EPYC: FP32 INT8"``."""
    name = core.get_property("CPU", "FULL_DEVICE_NAME")
    abilities = set(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")) - {"EXPORT_IMPORT"}
    return f"{platform.machine()} {name}: {' '.join(sorted(abilities))}"


def _export(compiled: Any) -> bytes:
    exported = compiled.export_model()
    return exported.getvalue() if isinstance(exported, io.BytesIO) else bytes(exported)


def _import(core: Any, sdk: ModuleType, path: Path, properties: Mapping[str, str]) -> Any:
    try:
        # Mapped, so that one copy is made of what may be gigabytes: OpenVINO's own, which outlives the file.
        content = sdk.Tensor(np.memmap(path, np.uint8, mode="r"))
        return core.import_model(content, "CPU", dict(properties))
    except TypeError:  # OpenVINO before 2025.3 takes streams only
        return core.import_model(io.BytesIO(path.read_bytes()), "CPU", dict(properties))
