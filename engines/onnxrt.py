"""ONNX Runtime on the CPU; its providers for GPUs are in :mod:`latentrt.engines.onnxrt_gpu`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .base import Array, BaseEngine, Engine, TensorSpec, check_feeds, check_threads
from .errors import EngineClosedError, EngineError, EngineUnavailableError, TensorMismatchError, translated
from .kind import CPU, DECOMPOSED, EngineArguments, EngineKind

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
        spinning: Let idle threads spin for the next operator while a run lasts: faster for a single image, wasteful
            where several requests share the processor. After a run they sleep: every session has threads of its own,
            and those of the text encoder would otherwise take processors from the first steps.
        arena: Keep memory between runs in an arena, which grows to the largest request that was served and never
            shrinks. Without it a run is slower, and a process gives memory back.
    """

    threads: int = 0
    spinning: bool = True
    arena: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "threads", check_threads(self.threads))


class OnnxRuntimeEngine(BaseEngine):
    """One ONNX graph in an ONNX Runtime session on the CPU.

    A session may run in many threads at once.

    Args:
        path: The graph. It must have passed :meth:`latentrt.runtime.bundle.reader.Bundle.graph_path`, since ONNX
            Runtime itself opens whatever files a graph names.
        options: Session settings.
        label: Name of the engine in messages.
        weights: Initializers to put in place of the graph's own, which it must have in another file. They must not be
            changed while the engine is open.
        exchangeable: Initializers that :meth:`with_weights` may replace later. They are not laid out for the processor
            when the graph is opened, as others are, but at every run, which makes runs a little slower.
    """

    def __init__(
        self,
        path: Path,
        options: OnnxRuntimeOptions | None = None,
        label: str | None = None,
        weights: Mapping[str, Array] | None = None,
        exchangeable: Sequence[TensorSpec] = (),
    ) -> None:
        super().__init__(label or f"{path.parent.name} (onnxruntime)")
        self.path = path
        self.options = options or OnnxRuntimeOptions()
        self.weights = dict(weights or {})
        self.exchangeable = {spec.name: spec for spec in exchangeable}
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
        if self.exchangeable:
            there = {node.name for node in session.get_overridable_initializers()}
            if lacking := self.exchangeable.keys() - there:
                raise EngineError(f"{self.label}: {self.path.name} has no weights named {min(lacking)!r} of its own")
        inputs = {node.name: _spec(node) for node in session.get_inputs()}
        outputs = {node.name: _spec(node) for node in session.get_outputs()}
        # ONNX Runtime gives an unknown rank as an empty shape, like that of a scalar.
        self._shapeless = frozenset(name for name, spec in outputs.items() if not spec.shape)
        self._session, self._output_names = session, list(outputs)
        return inputs, outputs

    def _make_session(self, ort: ModuleType, settings: Any) -> Any:
        graph: str | bytes = str(self.path)
        if self.exchangeable:
            # An initializer that is an input, too, is a default for it, and no constant (ONNX's IR since version 4).
            graph = with_inputs(self.path.read_bytes(), self.exchangeable.values())
            settings.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.path.parent)
            )
        return ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])

    def with_weights(self, weights: Mapping[str, Array]) -> ExchangedWeights:
        """This engine, open as it is, with other values for some of its exchangeable weights.

        Args:
            weights: By name; must not be changed while the engine is open.
        """
        return ExchangedWeights(self, weights)

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


class ExchangedWeights(BaseEngine):
    """An engine that is open already, with other weights. Opening it costs nothing; closing it leaves the other open.

    Args:
        engine: The engine; it must be open for as long as this one is used.
        weights: Of its exchangeable ones, by name.

    Raises:
        TensorMismatchError: on opening, if a weight is not exchangeable, or has another shape or element type.
    """

    def __init__(self, engine: OnnxRuntimeEngine, weights: Mapping[str, Array]) -> None:
        super().__init__(engine.label)
        self.engine = engine
        self._weights = dict(weights)

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        known = self.engine.exchangeable
        try:
            check_feeds({name: known[name] for name in self._weights if name in known}, self._weights)
        except TensorMismatchError as error:
            raise TensorMismatchError(f"{self.label}: {error}") from None
        self._shapeless, self.loose_outputs = self.engine._shapeless, self.engine.loose_outputs
        return self.engine.inputs, self.engine.outputs

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        return self.engine._run({**feeds, **self._weights})

    def _close(self) -> None:
        self._weights = {}


_ELEMENTS = {"float32": 1, "float16": 10}  # TensorProto.DataType


def with_inputs(graph: bytes, specs: Iterable[TensorSpec]) -> bytes:
    """A serialized ONNX model whose graph has more inputs, float32 or float16 and of fixed shapes.

    Two messages of protocol buffers one behind the other are one message with the fields of both, in which lists are
    joined (protobuf.dev, "Encoding", section on last one wins). Numbers of fields are those of onnx.proto.
    """
    added = b""
    for spec in specs:
        shape = b"".join(_field(1, _varint(1, int(length))) for length in spec.shape)
        kind = _varint(1, _ELEMENTS[spec.dtype]) + _field(2, shape)
        added += _field(11, _field(1, spec.name.encode()) + _field(2, _field(1, kind)))
    return graph + _field(7, added)


def _varint(number: int, value: int) -> bytes:
    return bytes([number << 3]) + _encoded(value)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


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


@dataclass(frozen=True)
class OnnxRuntimeKind(EngineKind):
    """ONNX Runtime on the CPU."""

    def version(self) -> str:
        """Version of ONNX Runtime."""
        return str(load_sdk().__version__)

    def make(self, arguments: EngineArguments) -> Engine:
        """The engine of one component."""
        return OnnxRuntimeEngine(
            arguments.path,
            OnnxRuntimeOptions(threads=arguments.threads, arena=not arguments.low_memory),
            f"{arguments.component} ({self.name})",
            arguments.weights,
            arguments.exchangeable,
        )


ONNX_RUNTIME = OnnxRuntimeKind(
    name="onnxruntime",
    title="ONNX Runtime",
    extra="",
    device=CPU,
    precisions=("fp32", "fp16", "int8", "int8-weights"),  # it has no bf16 and no fp8 arithmetic on a CPU
    form=DECOMPOSED,
    priority=40,
    switchable=True,
)
"""ONNX Runtime on the CPU."""
