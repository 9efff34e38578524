"""Run ONNX graphs with OpenVINO on a CPU."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..base import Array, BaseEngine, TensorSpec, check_threads
from ..checks import check_choice, check_integer
from ..errors import EngineClosedError, EngineError, EngineUnavailableError, InvalidRequestError, translated
from .cache import ModelCache, Opened
from .rewrite import rewrite

PRECISIONS = ("fp32", "bf16", "int8")
"""Precisions that a graph may be computed in."""

# numpy's names of element types, by OpenVINO's.
_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i8": "int8",
    "u8": "uint8",
    "boolean": "bool",
}
_HINTS = {"fp32": "f32", "bf16": "bf16"}


@dataclass(frozen=True)
class OpenVinoOptions:
    """Settings of a compiled model.

    Attributes:
        precision: Precision of the computation, one of :data:`PRECISIONS`; sums inside an operator are always fp32.
            ``"int8"`` is for a graph whose products are quantised: everything else is then bf16 if the processor has
            instructions for it, and fp32 if not.
        threads: Threads inside an operator; 0 leaves the choice to OpenVINO (one for each physical core).
        shapes: Lengths that never vary, by symbol, such as ``{"batch": 1, "latent_height": 64}``. A model compiled for
            them is faster, and takes no other lengths; symbols that are left out stay variable.

    Raises:
        InvalidRequestError: for an unknown precision, a number of threads below 0, or a length below 1.
    """

    precision: str = "fp32"
    threads: int = 0
    shapes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        object.__setattr__(self, "threads", check_threads(self.threads))
        lengths = {symbol: check_integer(f"shapes[{symbol!r}]", length, 1) for symbol, length in self.shapes.items()}
        object.__setattr__(self, "shapes", lengths)

    def computed_in(self, *, has_bf16: bool) -> str:
        """Return the precision of everything that is not quantised, ``"fp32"`` or ``"bf16"``.

        Args:
            has_bf16: Whether the processor has instructions for bf16.
        """
        if self.precision == "int8":
            return "bf16" if has_bf16 else "fp32"
        return self.precision

    def as_properties(self, *, has_bf16: bool) -> dict[str, str]:
        """Return OpenVINO's properties for these settings, but for the shapes, which :class:`OpenVinoEngine` applies.

        Args:
            has_bf16: Whether the processor has instructions for bf16.
        """
        hint = _HINTS[self.computed_in(has_bf16=has_bf16)]
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        if self.threads:
            properties["INFERENCE_NUM_THREADS"] = str(self.threads)
        return properties


class OpenVinoEngine(BaseEngine):
    """One ONNX graph compiled by OpenVINO for the CPU.

    Several threads may run it at once; each run takes an inference request of its own from a pool. OpenVINO reads
    inputs from the caller's arrays, and the engine copies outputs.

    Args:
        path: The graph. The caller must have checked it with
            :meth:`latentrt.runtime.bundle.reader.Bundle.graph_path`, since OpenVINO opens any file that a graph names.
        options: Settings; ``None`` takes the defaults.
        label: Name of the engine in messages; ``None`` makes one from the graph's folder.
        specs: Inputs and outputs as the manifest lists them. OpenVINO forgets the names of variable lengths; with these
            the engine checks that a name stands for one length throughout a call.
        cache: Where compiled models are kept; with ``None`` every opening compiles.
        weights: Constants that replace the graph's own, by name. They must not change while the engine is open.
    """

    def __init__(
        self,
        path: Path,
        options: OpenVinoOptions | None = None,
        label: str | None = None,
        specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]] | None = None,
        cache: ModelCache | None = None,
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        super().__init__(label or f"{path.parent.name} (openvino)")
        self.weights = dict(weights or {})
        self.path = path
        self.options = options or OpenVinoOptions()
        self.cache = cache
        self.opened = Opened(None)
        """The compiled model, and whether the bundle had it; set by :meth:`open`."""
        self._specs = specs
        self._compiled: Any = None
        self._feeds: Mapping[str, int] = {}
        self._fetches: Mapping[str, int] = {}
        self._idle: list[Any] = []
        self._pool = threading.Lock()

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        core = load_core()
        require_precision(core, self.options.precision)
        with translated(f"{self.label} could not load {self.path.name}", line=-1):
            self.opened = self._load(core)
        compiled = self.opened.model
        given = self._specs or ([_spec(port) for port in compiled.inputs], [_spec(port) for port in compiled.outputs])
        inputs, outputs = ({spec.name: self._fixed(spec) for spec in specs} for specs in given)
        # A tensor may have several names, of which the graph's own is one.
        self._feeds, self._fetches = _match(compiled.inputs, inputs), _match(compiled.outputs, outputs)
        self._compiled = compiled
        return inputs, outputs

    def _load(self, core: Any) -> Opened:
        properties = self.options.as_properties(has_bf16=has_bf16(core))

        def compile_model() -> Any:
            model = self._read()
            rewrite(model, load_sdk(), self.options.computed_in(has_bf16=has_bf16(core)))
            return core.compile_model(model, "CPU", properties)

        if self.cache is None or self.weights:  # a kept model has the graph's own weights compiled in
            return Opened(compile_model())
        return self.cache.load(
            core,
            load_sdk(),
            properties,
            compile_model,
            label=self.label,
            precision=self.options.precision,
            shapes=self.options.shapes,
        )

    def _read(self) -> Any:
        """Read the graph, with the fixed lengths in place of their symbols."""
        model = read_onnx(self.path)
        _replace_constants(model, self.weights)
        if shapes := self.options.shapes:
            specs = self._specs[0] if self._specs else [_spec(port) for port in model.inputs]
            known = dict.fromkeys(each for spec in specs for each in spec.shape if isinstance(each, str))
            if unknown := [symbol for symbol in shapes if symbol not in known]:
                raise InvalidRequestError(
                    f"{self.label} has no length called {unknown[0]!r}; it has {', '.join(known) or 'none'}"
                )
            fixed = [self._fixed(spec) for spec in specs]
            model.reshape({spec.name: [n if isinstance(n, int) else -1 for n in spec.shape] for spec in fixed})
        return model

    def _fixed(self, spec: TensorSpec) -> TensorSpec:
        shape = tuple(self.options.shapes.get(each, each) if isinstance(each, str) else each for each in spec.shape)
        return dataclasses.replace(spec, shape=shape)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        compiled = self._compiled
        if compiled is None:
            raise EngineClosedError(f"{self.label} was closed while it was in use")
        with translated(f"{self.label} failed", line=-1):
            with self._pool:
                request = self._idle.pop() if self._idle else None
            if request is None:
                request = compiled.create_infer_request()
            contiguous = {self._feeds[name]: np.asarray(array, order="C") for name, array in feeds.items()}
            results = request.infer(contiguous, share_inputs=True, share_outputs=True)
            # The next run of this request writes to the same memory.
            found = {name: np.array(results[place]) for name, place in self._fetches.items()}
        with self._pool:
            if self._compiled is compiled:
                self._idle.append(request)
        return found

    def _close(self) -> None:
        with self._pool:
            self._compiled = None
            self.opened = Opened(None)
            self._idle.clear()


def load_sdk() -> ModuleType:
    """Import OpenVINO.

    Raises:
        EngineUnavailableError: if it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise EngineUnavailableError(
            'OpenVINO is not installed; install it with: pip install "latentrt[openvino]"'
        ) from error
    return openvino  # type: ignore[no-any-return]


@functools.cache
def load_core() -> Any:
    """Return OpenVINO's entry point, one for the whole process, which is never freed.

    When the last entry point is freed, OpenVINO 2026.4 unloads its CPU plugin. The plugin has given the process a stack
    for signals and frees that memory too, so the next signal, such as Ctrl-C, would end the process.

    Raises:
        EngineUnavailableError: if OpenVINO is not installed.
    """
    return load_sdk().Core()


def has_bf16(core: Any) -> bool:
    """Whether this processor has instructions for bf16 that OpenVINO uses."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def require_precision(core: Any, precision: str) -> None:
    """Refuse a precision that this processor has no instructions for; OpenVINO would silently compute in fp32.

    Raises:
        EngineUnavailableError: with the precision to choose instead.
    """
    if precision == "bf16" and not has_bf16(core):
        raise EngineUnavailableError(
            "this processor has no instructions for bf16 (AVX-512 BF16 or AMX); choose precision fp32"
        )


def read_onnx(path: Path) -> Any:
    """Read a file as ONNX alone; OpenVINO's own ``read_model`` tries the readers of all formats that it knows."""
    frontend = load_sdk().frontend.FrontEndManager().load_by_framework("onnx")
    return frontend.convert(frontend.load(str(path)))


def _replace_constants(model: Any, weights: Mapping[str, Array]) -> None:
    """Replace constants of a model, by name.

    Raises:
        EngineError: if the model has no constant of that name.
    """
    own = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    for name, values in weights.items():
        if name not in own:
            raise EngineError(f"the graph has no constant {name!r} to put another in place of")
        constant = load_sdk().op.Constant(values, shared_memory=True)
        for user in own[name].output(0).get_target_inputs():
            user.replace_source_output(constant.output(0))


def _match(ports: Sequence[Any], specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Return the indices of the ports that have the names of ``specs``."""
    places = {name: place for place, port in enumerate(ports) for name in port.get_names()}
    if missing := [name for name in specs if name not in places]:
        raise EngineError(f"the compiled graph has no tensor {missing[0]!r}")
    return {name: places[name] for name in specs}


def _spec(port: Any) -> TensorSpec:
    name, kind = port.any_name, port.element_type.get_type_name()
    if kind not in _DTYPES:
        raise EngineError(f"the graph's tensor {name!r} is of type {kind}, which is not supported")
    shape = tuple(
        f"{name}_{axis}" if length.is_dynamic else int(length.get_length())
        for axis, length in enumerate(port.partial_shape)
    )
    return TensorSpec(name, _DTYPES[kind], shape)
