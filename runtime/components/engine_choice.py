"""From the name of an engine to an engine for each component of a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from numpy.typing import NDArray

from latentrt.engines import Engine, TensorSpec
from latentrt.engines.errors import (
    BundleError,
    BundleIntegrityError,
    EngineUnavailableError,
    InvalidRequestError,
    LatentRTError,
)
from latentrt.engines.onnxrt import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.engines.onnxrt_gpu import PROVIDERS, OnnxRuntimeGpuEngine
from latentrt.engines.openvino.cache import ModelCache
from latentrt.engines.openvino.engine import OpenVinoEngine, OpenVinoOptions
from latentrt.engines.openvino.winograd import largest_tile
from latentrt.engines.store import EngineStore
from latentrt.engines.trt import SDK_MODULES, TensorRTEngine
from latentrt.engines.trt.cuda import cuda_devices

from ..bundle.manifest import IMAGE_ENCODER, PRECISIONS, SAFETY_CHECKER, TINY_DECODER, Component, Graph
from ..bundle.reader import Bundle
from ..families import family_of
from .engine_probe import SUPPORTED, check_engine, check_precision
from .lora_weights import exchangeable_weights
from .plans import find_plan

CACHES = ("read", "write", "off")
"""What to do with compiled models of a bundle, see :class:`EngineSettings`."""

AUTO = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime", "openvino")
"""Engines that ``"auto"`` chooses from, the best first.

On a CPU, ONNX Runtime comes first for small models. Of the emoji model in fp32, on two cores with AVX2, a step takes
OpenVINO 1.09 times as long (1.15 times the processor's time on one thread, 1.13 with fixed lengths), and a bundle opens
four times as fast unless its OpenVINO models are compiled already. When OpenVINO goes first is in :func:`automatic`.
The providers for TensorRT are left out: they build at the first request.
"""

LARGE = 400_000_000
"""From so many bytes of weights on, in fp32, a U-Net has convolutions that OpenVINO computes in fewer operations."""

# These take attention and group normalisation as single operators. ONNX Runtime's CUDA provider has no kernel for
# GroupNormalization, had none for Attention until 2026, and lacks some of other operators' newest versions; what it
# lacks goes to the CPU. So it takes the decomposed graph, whose operators it has had for years.
_NATIVE = frozenset({"tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"})


Weights: TypeAlias = Mapping[str, NDArray[Any]] | None
"""Initializers to put in place of a graph's own, by name."""


@dataclass(frozen=True)
class FixedSize:
    """The only size that a pipeline draws.

    Attributes:
        width: In pixels.
        height: In pixels.
        images: Pictures of a request.
    """

    width: int
    height: int
    images: int


@dataclass(frozen=True)
class EngineSettings:
    """What was asked of the engines of a pipeline.

    Attributes:
        name: One of :data:`ENGINES`, or ``"auto"``.
        precision: One of :data:`~latentrt.runtime.bundle.manifest.PRECISIONS`, or ``None`` for the highest that there
        is. threads: Threads inside an operator on a CPU; 0 is automatic.
        engine_cache: What to do with models that OpenVINO compiled: ``"read"`` uses those of the bundle, ``"write"``
            also stores what had to be compiled, ``"off"`` opens none.
        fixed_size: The only size to be drawn, if there is one.
        verify_hash: Hash a plan before it is opened. (A compiled OpenVINO model always is.)
        low_memory: Keep no memory between runs that the next one could use.
        switchable: Leave the weights that LoRAs change exchangeable in engines that are open.
    """

    name: str = "auto"
    precision: str | None = None
    threads: int = 0
    engine_cache: str = "read"
    fixed_size: FixedSize | None = None
    verify_hash: bool = False
    low_memory: bool = False
    switchable: bool = False

    def __post_init__(self) -> None:
        if self.engine_cache not in CACHES:
            raise InvalidRequestError(f"engine_cache is {self.engine_cache!r}, expected one of {', '.join(CACHES)}")


@dataclass(frozen=True)
class EngineChoice:
    """Which engine a pipeline runs on, and why.

    Attributes:
        name: One of :data:`ENGINES`.
        reason: In a few words.
        passed_over: Engines that ``"auto"`` would have preferred, and why it could not take them.
    """

    name: str
    reason: str
    passed_over: Mapping[str, str] = field(default_factory=dict)


def automatic(bundle: Bundle, settings: EngineSettings) -> list[str]:
    """Engines that ``"auto"`` chooses from, the best first; none for a precision that is unknown.

    OpenVINO goes before ONNX Runtime
        - in int8: a step of the emoji model takes 0.5 of fp32's time with VNNI and 0.7 to 1.0 without, and in ONNX
          Runtime 1.2 to 1.4 with or without;
        - in fp32 for a U-Net of :data:`LARGE` weights, whose wide convolutions it computes by tiles on processors that
          are for it, see :mod:`latentrt.engines.openvino.winograd` (a step of Stable Diffusion 1.5's size took 6.7 s
          without
          a fixed size, and 8.7 in ONNX Runtime); not with ``low_memory``, where components are opened for every
          picture, nor with ``switchable``, which ONNX Runtime alone can do.

    Args:
        bundle: What is to be opened.
        settings: What is asked for.
    """
    found = [name for name in AUTO if settings.precision is None or settings.precision in SUPPORTED[name]]
    first = settings.precision == "int8" or _tiles_pay(bundle, settings)
    return sorted(found, key=lambda name: name == "onnxruntime") if first else found


def _tiles_pay(bundle: Bundle, settings: EngineSettings) -> bool:
    manifest = bundle.manifest
    unet = manifest.components.get("unet_step") or manifest.components.get("unet")
    if unet is None or settings.low_memory or settings.switchable or settings.precision not in (None, "fp32"):
        return False
    if _highest(unet) != "fp32" or not largest_tile("fp32"):
        return False
    graph = choose_graph(unet, "openvino", "fp32")[1]
    return sum(manifest.files[path].size for path in (graph.file, *graph.external)) >= LARGE


def choose_engine(
    bundle: Bundle, components: Iterable[str], settings: EngineSettings, failed: Mapping[str, str] | None = None
) -> EngineChoice:
    """Find the engine for what was asked: the named one if it can run here, or with ``"auto"`` the best that can.

    ``"auto"`` never lowers precision: without one it takes the highest that the bundle has, whatever is faster.

    Args:
        bundle: The bundle.
        components: What is to be opened of it.
        settings: What is asked for.
        failed: Engines that did not open when they were chosen, and why; ``"auto"`` passes them over.

    Raises:
        InvalidRequestError: if the engine or the precision is unknown, or the two do not go together.
        EngineUnavailableError: if the engine, or with ``"auto"`` every one, lacks something here.
        BundleError: if the bundle lacks what the engine needs.
    """
    components = list(components)
    if settings.name != "auto":
        check_engine(settings.name, settings.precision)
        return EngineChoice(settings.name, "asked for")
    candidates = automatic(bundle, settings)
    if not candidates:
        check_precision(AUTO[0], settings.precision)  # says what there is
    passed_over: dict[str, str] = {}
    failures: list[LatentRTError] = []
    for name in candidates:
        try:
            if failed and name in failed:
                raise EngineUnavailableError(failed[name])
            reason = _why(bundle, components, dataclasses.replace(settings, name=name))
        except BundleIntegrityError:
            raise
        except (EngineUnavailableError, BundleError) as error:
            passed_over[name] = str(error)
            failures.append(error)
        else:
            return EngineChoice(name, reason, passed_over)
    raise failures[-1]


def _why(bundle: Bundle, components: Iterable[str], settings: EngineSettings) -> str:
    """Why an engine can be taken, once it is known that it can."""
    name = settings.name
    on_gpu = name not in ("onnxruntime", "openvino")
    if on_gpu and not cuda_devices():  # before any SDK is loaded
        raise EngineUnavailableError("no CUDA device was found")
    for component in components:
        graphs = _component(bundle, component)
        if name in SDK_MODULES:
            highest = settings.precision or _highest(graphs)
            find_plan(bundle, name, component, highest)
        else:
            choose_graph(graphs, name, _stored_precision(settings))
    check_engine(name, settings.precision)
    if name in SDK_MODULES:
        return f"the bundle has plans for this {cuda_devices()[0].name}"
    if on_gpu:
        return f"the bundle has no plans for this {cuda_devices()[0].name}, and ONNX Runtime has CUDA"
    if name == "openvino":
        if _tiles_pay(bundle, settings):
            return "the fastest for a U-Net of this size on a CPU"
        beside = "onnxruntime" in automatic(bundle, settings)
        return f"{'the fastest' if beside else 'the one that computes'} in {settings.precision} on this CPU"
    return "the fastest on a CPU" if not cuda_devices() else "nothing else can use the GPU here"


def _highest(component: Component) -> str:
    """The highest precision that a component's graphs have."""
    return min((form.partition("-")[2] for form in component.graphs), key=PRECISIONS.index, default="fp32")


def _stored_precision(settings: EngineSettings) -> str | None:
    """Precision of the graphs to open: for bf16 OpenVINO takes those of fp32 and rounds the weights by itself."""
    return "fp32" if (settings.name, settings.precision) == ("openvino", "bf16") else settings.precision


def choose_graph(component: Component, engine: str, precision: str | None) -> tuple[str, Graph]:
    """The graph of a component that an engine should open, with the name of its form.

    On a CPU, and for ONNX Runtime's CUDA provider, decomposed operators are better; TensorRT of every kind takes native
    ones. A component that was kept in fp32 when the bundle was built for fp16, because half precision overflows, has
    the form of fp16 and serves it.

    Raises:
        BundleError: if the bundle has none that fits.
    """
    for each in SUPPORTED.get(engine, PRECISIONS) if precision is None else (precision,):
        fitting = [(name, graph) for name, graph in component.graphs.items() if name.partition("-")[2] == each]
        if fitting:
            best = max if engine in _NATIVE else min
            return best(fitting, key=lambda item: item[1].opset)
    raise BundleError(
        f"the bundle has no graph of {component.name} for {engine} at {precision or 'any precision'}; "
        f"it has {', '.join(component.graphs) or 'none'}"
    )


def graph_for(bundle: Bundle, component: str, settings: EngineSettings) -> Graph:
    """The graph that the engine of a component computes.

    Raises:
        BundleError: if the bundle has none that fits.
        EngineUnavailableError: if the engine needs a plan and the bundle has none that fits.
    """
    if settings.name in SDK_MODULES:
        return bundle.graph(component, find_plan(bundle, settings.name, component, settings.precision).form)
    return choose_graph(_component(bundle, component), settings.name, _stored_precision(settings))[1]


def most_pictures(bundle: Bundle, components: Iterable[str], settings: EngineSettings) -> int | None:
    """Most pictures at a time that the plans of a bundle were compiled for; ``None`` where nothing limits them.

    Raises:
        EngineUnavailableError: if the engine needs a plan and the bundle has none that fits.
    """
    if settings.name not in SDK_MODULES:
        return None
    plans = [find_plan(bundle, settings.name, component, settings.precision) for component in components]
    profiles = [plan.record.profile for plan in plans]
    return min(
        (profile[name][2][0] for profile in profiles for name in ("registers", "latent_sample") if name in profile),
        default=None,
    )


def _onnxruntime(bundle: Bundle, component: str, settings: EngineSettings, weights: Weights) -> Engine:
    form, graph = choose_graph(bundle.manifest.components[component], settings.name, settings.precision)
    path = bundle.graph_path(component, form)
    options = OnnxRuntimeOptions(threads=settings.threads, arena=not settings.low_memory)
    exchangeable: Sequence[TensorSpec] = ()
    if settings.switchable and not weights:
        exchangeable = exchangeable_weights(bundle, component, graph, family_of(bundle.manifest))
    return OnnxRuntimeEngine(path, options, f"{component} (onnxruntime)", weights, exchangeable)


def _onnxruntime_gpu(bundle: Bundle, component: str, settings: EngineSettings, weights: Weights) -> Engine:
    form, _ = choose_graph(bundle.manifest.components[component], settings.name, settings.precision)
    label = f"{component} ({settings.name})"
    return OnnxRuntimeGpuEngine(bundle.graph_path(component, form), settings.name, label=label, weights=weights)


def _openvino(bundle: Bundle, component: str, settings: EngineSettings, weights: Weights) -> Engine:
    return openvino_engine(bundle, component, settings, weights=weights)


def openvino_engine(
    bundle: Bundle, component: str, settings: EngineSettings, *, required: bool = False, weights: Weights = None
) -> OpenVinoEngine:
    """The OpenVINO engine of one component, not yet opened.

    Args:
        bundle: The bundle.
        component: Part of the model.
        settings: What is asked for.
        required: With ``engine_cache="write"``: fail where the compiled model cannot be stored.
        weights: In place of the graph's own, by name; compiled anew then.

    Raises:
        BundleError: if the bundle has no graph that fits.
    """
    computed_in = settings.precision if settings.precision in ("bf16", "int8") else "fp32"
    form, graph = choose_graph(bundle.manifest.components[component], settings.name, _stored_precision(settings))
    shapes = _fixed_lengths(bundle, component, graph, settings.fixed_size)
    cache = None
    if settings.engine_cache != "off":
        files = bundle.manifest.files
        cache = ModelCache(
            EngineStore(bundle.engines_directory),
            component,
            files[graph.file].sha256,
            {name: files[name].sha256 for name in graph.external},
            keep=settings.engine_cache == "write",
            required=required,
        )
    return OpenVinoEngine(
        bundle.graph_path(component, form),
        OpenVinoOptions(computed_in, settings.threads, shapes),
        f"{component} (openvino, {computed_in})",
        (graph.inputs, graph.outputs),
        cache,
        weights,
    )


def _fixed_lengths(bundle: Bundle, component: str, graph: Graph, size: FixedSize | None) -> dict[str, int]:
    """Lengths that never vary, by symbol of the graph, where only one size is drawn.

    Rows of the denoiser do vary: there are twice as many in the part of a run that is guided.
    """
    if size is None:
        return {}
    factor = bundle.manifest.latent.vae_scale_factor
    known = {"latent_height": size.height // factor, "latent_width": size.width // factor}
    if component.startswith(("text_encoder", IMAGE_ENCODER, SAFETY_CHECKER)) or component.endswith("_prompt"):
        known["batch"] = 1  # texts come one by one, and so do the pictures that CLIP looks at
    elif component.endswith("_step") or component in ("vae_decoder", TINY_DECODER):
        known["batch"] = size.images
    if "prompt_syntax" in family_of(bundle.manifest).options:  # one chunk of tokens; others choose a text's length
        known["text_length"] = max(tokenizer.max_length for tokenizer in bundle.manifest.tokenizers.values())
    symbols = {length for spec in graph.inputs for length in spec.shape}
    return {symbol: length for symbol, length in known.items() if symbol in symbols}


def _tensorrt(bundle: Bundle, component: str, settings: EngineSettings, weights: Weights) -> Engine:
    plan = find_plan(bundle, settings.name, component, settings.precision)
    store, record = EngineStore(bundle.engines_directory), plan.record
    if settings.verify_hash:
        store.find(record.key)
    graph = bundle.graph(component, plan.form)
    return TensorRTEngine(
        store.path(record),
        engine=settings.name,
        target=record.target,
        signature=(graph.inputs, graph.outputs),
        label=f"{component} ({settings.name})",
        weights=weights,
    )


ENGINES: Mapping[str, Callable[[Bundle, str, EngineSettings, Weights], Engine]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    **dict.fromkeys(PROVIDERS, _onnxruntime_gpu),
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
}
"""Engines by name; each entry makes the (still closed) engine of one component."""


def make_engine(bundle: Bundle, component: str, settings: EngineSettings, weights: Weights = None) -> Engine:
    """The engine of one component, not yet opened.

    Args:
        bundle: The bundle.
        component: Part of the model.
        settings: What is asked for.
        weights: In place of the graph's own, by name.

    Raises:
        InvalidRequestError: for an unknown engine or precision.
        BundleError: if the bundle lacks the component or a graph for the engine.
        EngineUnavailableError: if the bundle holds no plan that fits, or with ``"auto"`` no engine can run here.
    """
    _component(bundle, component)
    if settings.name == "auto":
        settings = dataclasses.replace(settings, name=choose_engine(bundle, [component], settings).name)
    check_precision(settings.name, settings.precision)
    return ENGINES[settings.name](bundle, component, settings, weights)


def _component(bundle: Bundle, name: str) -> Component:
    if name not in bundle.manifest.components:
        raise BundleError(f"the bundle has no {name}; it has {', '.join(bundle.manifest.components)}")
    return bundle.manifest.components[name]
