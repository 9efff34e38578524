"""ONNX Runtime on the CPU; its providers for GPUs are in :mod:`.onnxrt_gpu`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .base import Array, BaseEngine, TensorSpec, check_threads
from .errors import EngineClosedError, EngineError, EngineUnavailableError, translated

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
"""ONNX Runtime's names of element types."""

_ERRORS_ONLY = 3


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """Settings of a session.

    Attributes:
        threads: Threads inside an operator; 0 leaves the choice to ONNX Runtime (one a physical core).
        spinning: Let idle threads spin for the next operator while a run lasts: faster for a single picture, wasteful
            where several requests share the processor. After a run they sleep: every session has threads of its own,
            and those of the text encoder would otherwise take processors from the first steps.
        arena: Keep memory between runs in an arena, which grows to the largest request that was served and never
            shrinks. Without it a run is slower, and a process gives memory back.
    """

    threads: int = 0
    spinning: bool = True
    arena: bool = True

    def __post_init__(self) -> None:
        check_threads(self.threads)


class OnnxRuntimeEngine(BaseEngine):
    """One ONNX graph in an ONNX Runtime session on the CPU.

    A session may run in many threads at once.

    Args:
        path: The graph. It must have passed :meth:`latentrt.runtime.bundle.Bundle.graph_path`, since ONNX Runtime
            itself opens whatever files a graph names.
        options: Session settings.
        label: What messages call the engine.
        weights: Initializers to put in place of the graph's own, which it must have in another file. They must not be
            changed while the engine is open.
    """

    def __init__(
        self,
        path: Path,
        options: OnnxRuntimeOptions | None = None,
        label: str | None = None,
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        super().__init__(label or f"{path.parent.name} (onnxruntime)")
        self.path = path
        self.options = options or OnnxRuntimeOptions()
        self.weights = dict(weights or {})
        self._session: Any = None
        self._output_names: list[str] = []

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        ort = load_sdk()
        settings = ort.SessionOptions()
        settings.log_severity_level = _ERRORS_ONLY
        settings.intra_op_num_threads = self.options.threads
        settings.enable_cpu_mem_arena = self.options.arena
        settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.options.spinning else "0")
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        # Otherwise its kernels for 8 bits add products up in 16 bits where a processor lacks VNNI, and that overflows.
        settings.add_session_config_entry("session.x64quantprecision", "1")
        with translated(f"{self.label} could not load {self.path.name}"):
            if self.weights:  # before anything is optimised, so that what is computed from them is right, too
                values = [ort.OrtValue.ortvalue_from_numpy(values) for values in self.weights.values()]
                settings.add_external_initializers(list(self.weights), values)
            session = self._make_session(ort, settings)
        inputs = {node.name: _spec(node) for node in session.get_inputs()}
        outputs = {node.name: _spec(node) for node in session.get_outputs()}
        self._session, self._output_names = session, list(outputs)
        return inputs, outputs

    def _make_session(self, ort: ModuleType, settings: Any) -> Any:
        return ort.InferenceSession(str(self.path), settings, providers=["CPUExecutionProvider"])

    def _running_session(self) -> Any:
        if (session := self._session) is None:
            raise EngineClosedError(f"{self.label} was closed while it was in use")
        return session

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        session = self._running_session()
        with translated(f"{self.label} failed"):
            results = session.run(self._output_names, feeds)
        return dict(zip(self._output_names, results, strict=True))

    def _close(self) -> None:
        self._session = None


def load_sdk() -> ModuleType:
    """Import ONNX Runtime.

    Raises:
        EngineUnavailableError: if it is not installed.
    """
    # Python packages of CPU builds look for GPUs at import; nothing of that is of use to the reader of our output.
    os.environ.setdefault("ORT_LOGGING_LEVEL", str(_ERRORS_ONLY))
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailableError(
            "ONNX Runtime is not installed; install it with: pip install onnxruntime"
        ) from error
    return onnxruntime  # type: ignore[no-any-return]


def _spec(node: Any) -> TensorSpec:
    if node.type not in DTYPES:
        raise EngineError(f"the graph's tensor {node.name!r} is a {node.type}, which is not supported")
    shape = tuple(
        d if isinstance(d, int) else str(d) if d else f"{node.name}_{axis}" for axis, d in enumerate(node.shape)
    )
    return TensorSpec(node.name, DTYPES[node.type], shape)
