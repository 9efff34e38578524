"""From the name of an engine to an engine for each component of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from latentrt.engines import Engine
from latentrt.engines.errors import BundleError, EngineUnavailableError, InvalidRequestError
from latentrt.engines.onnxrt import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.engines.ov import OpenVinoEngine, OpenVinoOptions
from latentrt.engines.store import EngineRecord, EngineStore
from latentrt.engines.trt import TensorRTEngine

from .bundle import Bundle
from .manifest import Component, Graph

_LAST_DECOMPOSED_OPSET = 20


@dataclass(frozen=True)
class EngineSettings:
    """What was asked of the engines of a pipeline.

    Attributes:
        name: One of :data:`ENGINES`, or ``"auto"``.
        precision: ``"fp32"``, ``"fp16"``, with OpenVINO also ``"bf16"``, or ``None`` for the highest that there is.
        threads: Threads inside an operator on a CPU; 0 is automatic.
    """

    name: str = "auto"
    precision: str | None = None
    threads: int = 0


def choose_graph(component: Component, engine: str, precision: str | None) -> tuple[str, Graph]:
    """The graph of a component that an engine should open, with the name of its form.

    On a CPU decomposed operators are faster. A component that was kept in fp32 when the bundle was built for fp16,
    because half precision overflows, has the form of fp16 and serves it.

    Raises:
        BundleError: if the bundle has none that fits.
    """
    for each in ("fp32", "fp16") if precision is None else (precision,):
        fitting = [(name, graph) for name, graph in component.graphs.items() if name.partition("-")[2] == each]
        if fitting:
            return min(fitting, key=lambda item: (item[1].opset > _LAST_DECOMPOSED_OPSET, item[1].opset))
    raise BundleError(
        f"the bundle has no graph of {component.name} for {engine} at {precision or 'any precision'}; "
        f"it has {', '.join(component.graphs) or 'none'}"
    )


def _onnxruntime(bundle: Bundle, component: str, settings: EngineSettings) -> Engine:
    form, _ = choose_graph(bundle.manifest.components[component], settings.name, settings.precision)
    path = bundle.graph_path(component, form)
    return OnnxRuntimeEngine(path, OnnxRuntimeOptions(threads=settings.threads), f"{component} (onnxruntime)")


def _openvino(bundle: Bundle, component: str, settings: EngineSettings) -> Engine:
    computed_in = "bf16" if settings.precision == "bf16" else "fp32"
    stored = "fp32" if settings.precision == "bf16" else settings.precision  # OpenVINO rounds fp32 weights by itself
    form, graph = choose_graph(bundle.manifest.components[component], settings.name, stored)
    return OpenVinoEngine(
        bundle.graph_path(component, form),
        OpenVinoOptions(computed_in, settings.threads),
        f"{component} (openvino, {computed_in})",
        (graph.inputs, graph.outputs),
    )


def _tensorrt(bundle: Bundle, component: str, settings: EngineSettings) -> Engine:
    records = compiled_engines(bundle, settings.name, component)
    if settings.precision is not None:
        records = [record for record in records if record.precision in (settings.precision, "fp32")]
    if not records:
        raise EngineUnavailableError(
            f"the bundle has no {settings.name} plan of {component}; build one with: "
            f"latentrt build-engine SOURCE --output {bundle.path} --engine {settings.name}"
        )
    newest = max(records, key=lambda record: (record.precision == settings.precision, record.created))
    plan = EngineStore(bundle.engines_directory).path(newest)
    return TensorRTEngine(plan, engine=settings.name, target=newest.target)


ENGINES: Mapping[str, Callable[[Bundle, str, EngineSettings], Engine]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
}
"""Engines by name; each entry makes the (still closed) engine of one component."""


def compiled_engines(bundle: Bundle, engine: str, component: str) -> list[EngineRecord]:
    """Compiled engines that the bundle holds for ``engine`` and ``component``."""
    records = EngineStore(bundle.engines_directory).records()
    return [record for record in records if record.engine == engine and record.component == component]


def make_engine(bundle: Bundle, component: str, settings: EngineSettings) -> Engine:
    """The engine of one component, not yet opened.

    Raises:
        InvalidRequestError: for an unknown engine.
        BundleError: if the bundle lacks the component or a graph for the engine.
        EngineUnavailableError: if the bundle holds no compiled engine of that kind.
    """
    if settings.name not in (*ENGINES, "auto"):
        raise InvalidRequestError(f"unknown engine {settings.name!r}; known engines: {', '.join(ENGINES)}, auto")
    if component not in bundle.manifest.components:
        raise BundleError(f"the bundle has no {component}; it has {', '.join(bundle.manifest.components)}")
    if settings.name == "auto":  # ONNX Runtime is part of every installation; compiled engines are asked for by name
        settings = EngineSettings("onnxruntime", settings.precision, settings.threads)
    return ENGINES[settings.name](bundle, component, settings)
