"""From the name of an engine to an engine for each component of a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.base import BaseEngine
from latentrt.engines.checks import check_choice
from latentrt.engines.errors import BundleError, BundleIntegrityError, EngineUnavailableError, LatentRTError
from latentrt.engines.kind import CPU, EngineArguments, EngineKind
from latentrt.engines.kinds import KINDS, automatic_kinds, kind_of
from latentrt.engines.onnxrt import ONNX_RUNTIME
from latentrt.engines.openvino.kind import OPENVINO
from latentrt.engines.store import EngineStore
from latentrt.engines.trt.cuda import cuda_devices

from ..bundle.manifest import IMAGE_ENCODER, PRECISIONS, SAFETY_CHECKER, TINY_DECODER, Component, Graph
from ..bundle.reader import Bundle
from ..families import family_of
from .engine_probe import check_engine, check_precision
from .lora_weights import exchangeable_weights
from .plans import find_plan

ENGINES: Mapping[str, EngineKind] = KINDS
"""Engines by name: the table of :mod:`latentrt.engines.kinds`."""

CACHES = ("read", "write", "off")
"""Values of :attr:`EngineSettings.engine_cache`."""

LARGE = 400_000_000
"""From so many bytes of weights on, in fp32, a U-Net has convolutions that OpenVINO computes in fewer operations."""

Weights: TypeAlias = Mapping[str, NDArray[Any]] | None
"""Initializers to put in place of a graph's own, by name."""


@dataclass(frozen=True)
class FixedSize:
    """The only size that a pipeline draws.

    Attributes:
        width: Width of an image in pixels.
        height: Height of an image in pixels.
        images: Images of a request.
    """

    width: int
    height: int
    images: int


@dataclass(frozen=True)
class EngineSettings:
    """How to open the engines of a pipeline.

    Attributes:
        name: One of :data:`ENGINES`, or ``"auto"``.
        precision: One of :data:`~latentrt.runtime.bundle.manifest.PRECISIONS`, or ``None`` for the highest that the
            bundle has.
        threads: Threads inside an operator on a CPU; 0 is automatic.
        engine_cache: Use of models that OpenVINO compiled: ``"read"`` opens those of the bundle, ``"write"`` also
            stores those that had to be compiled, ``"off"`` opens none.
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
        check_choice("engine_cache", self.engine_cache, CACHES)


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

    The order is that of :func:`~latentrt.engines.kinds.automatic_kinds`, except that OpenVINO goes before ONNX Runtime
        - in int8: a step of the emoji model takes 0.5 of fp32's time with VNNI and 0.7 to 1.0 without, and in ONNX
          Runtime 1.2 to 1.4 with or without;
        - in fp32 for a U-Net of :data:`LARGE` weights, whose wide convolutions it computes by tiles on processors that
          are for it, see :mod:`latentrt.engines.openvino.winograd` (a step of Stable Diffusion 1.5's size took 6.7 s
          without a fixed size, and 8.7 in ONNX Runtime); not with ``low_memory``, where components are opened for every
          request, nor with ``switchable``, which ONNX Runtime alone can do.

    Args:
        bundle: The bundle to open.
        settings: How to open it.
    """
    found = [
        kind.name for kind in automatic_kinds() if settings.precision is None or settings.precision in kind.precisions
    ]
    if {OPENVINO.name, ONNX_RUNTIME.name} <= set(found) and (
        settings.precision == "int8" or _tiles_pay(bundle, settings)
    ):
        found.remove(OPENVINO.name)
        found.insert(found.index(ONNX_RUNTIME.name), OPENVINO.name)
    return found


def _tiles_pay(bundle: Bundle, settings: EngineSettings) -> bool:
    manifest = bundle.manifest
    unet = manifest.components.get("unet_step") or manifest.components.get("unet")
    if unet is None or settings.low_memory or settings.switchable or settings.precision not in (None, "fp32"):
        return False
    from latentrt.engines.openvino import winograd

    if _highest(unet) != "fp32" or not winograd.largest_tile("fp32"):
        return False
    graph = choose_graph(unet, OPENVINO.name, "fp32")[1]
    return sum(manifest.files[path].size for path in (graph.file, *graph.external)) >= LARGE


def choose_engine(
    bundle: Bundle, components: Iterable[str], settings: EngineSettings, failed: Mapping[str, str] | None = None
) -> EngineChoice:
    """Choose the engine: the one that is named if it can run here, or with ``"auto"`` the best that can.

    ``"auto"`` never lowers precision: without one it takes the highest that the bundle has, whatever is faster.

    Args:
        bundle: The bundle.
        components: Components of it that are to be opened.
        settings: How to open them.
        failed: Engines that did not open when they were chosen, and why; ``"auto"`` passes them over.

    Raises:
        InvalidRequestError: if the engine or the precision is unknown, or the two do not go together.
        EngineUnavailableError: if the engine, or with ``"auto"`` every one, lacks something here.
        BundleError: if the bundle has no graph for the engine.
    """
    components = list(components)
    if settings.name != "auto":
        check_engine(settings.name, settings.precision)
        return EngineChoice(settings.name, "asked for")
    candidates = automatic(bundle, settings)
    if not candidates:
        check_precision(automatic_kinds()[0].name, settings.precision)  # lists the precisions that are known
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
    """Why an engine can be taken, once it is known that it can.

    Raises:
        EngineUnavailableError: if it cannot run here, or the bundle has no plan for it.
        BundleError: if the bundle has no graph for it.
    """
    kind = kind_of(settings.name)
    if kind.device != CPU and not cuda_devices():  # before any SDK is loaded
        raise EngineUnavailableError("no CUDA device was found")
    for component in components:
        graphs = _component(bundle, component)
        if kind.needs_plans:
            find_plan(bundle, kind.name, component, settings.precision or _highest(graphs))
        else:
            choose_graph(graphs, kind.name, kind.graph_precision(settings.precision))
    check_engine(kind.name, settings.precision)
    if kind.needs_plans:
        return f"the bundle has plans for this {cuda_devices()[0].name}"
    if kind.device != CPU:
        return f"the bundle has no plans for this {cuda_devices()[0].name}, and {kind.title} needs none"
    rivals = [name for name in automatic(bundle, settings) if KINDS[name].device == CPU]
    if rivals[0] != kind.name:
        return "engines that are faster cannot run it here"
    if settings.precision is not None and len(rivals) == 1:
        return f"the one that computes in {settings.precision} on this CPU"
    if kind is OPENVINO:
        size = "for a U-Net of this size on a CPU"
        return f"the fastest {size if _tiles_pay(bundle, settings) else f'in {settings.precision} on this CPU'}"
    return "the fastest on a CPU" if not cuda_devices() else "nothing else can use the GPU here"


def _highest(component: Component) -> str:
    """The highest precision that a component's graphs have."""
    return min((form.partition("-")[2] for form in component.graphs), key=PRECISIONS.index, default="fp32")


def choose_graph(component: Component, engine: str, precision: str | None) -> tuple[str, Graph]:
    """The graph of a component that an engine should open, with the name of its form.

    Kinds of native form take the graph of the highest operator set, others that of the lowest, see
    :class:`~latentrt.engines.kind.GraphForm`. A component that was kept in fp32 when the bundle was built for fp16,
    because half precision overflows, has the form of fp16 and serves it.

    Args:
        component: The component.
        engine: Name of the engine.
        precision: Precision of the form; ``None`` takes the highest that the engine has kernels for.

    Raises:
        InvalidRequestError: if the engine is unknown.
        BundleError: if the bundle has none that fits.
    """
    kind = kind_of(engine)
    for each in kind.precisions if precision is None else (precision,):
        fitting = [(name, graph) for name, graph in component.graphs.items() if name.partition("-")[2] == each]
        if fitting:
            best = max if kind.form.native else min
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
    kind = kind_of(settings.name)
    if kind.needs_plans:
        return bundle.graph(component, find_plan(bundle, kind.name, component, settings.precision).form)
    return choose_graph(_component(bundle, component), kind.name, kind.graph_precision(settings.precision))[1]


def most_pictures(bundle: Bundle, components: Iterable[str], settings: EngineSettings) -> int | None:
    """Most images at a time that the plans of a bundle were compiled for; ``None`` where nothing limits them.

    Raises:
        EngineUnavailableError: if the engine needs a plan and the bundle has none that fits.
    """
    if not kind_of(settings.name).needs_plans:
        return None
    plans = [find_plan(bundle, settings.name, component, settings.precision) for component in components]
    profiles = [plan.record.profile for plan in plans]
    return min(
        (profile[name][2][0] for profile in profiles for name in ("registers", "latent_sample") if name in profile),
        default=None,
    )


def engine_arguments(
    bundle: Bundle, component: str, settings: EngineSettings, weights: Weights = None, *, must_keep: bool = False
) -> EngineArguments:
    """The arguments that a kind makes the engine of one component from.

    Args:
        bundle: The bundle.
        component: Part of the model.
        settings: How to open it; ``name`` is an engine's, not ``"auto"``.
        weights: In place of the graph's own, by name.
        must_keep: With ``engine_cache="write"``: fail where a compiled model cannot be stored.

    Raises:
        BundleError: if the bundle has no graph that fits, or a file of it is damaged.
        EngineUnavailableError: if the engine needs a plan and the bundle has none that fits.
    """
    kind, store, target = kind_of(settings.name), EngineStore(bundle.engines_directory), ""
    if kind.needs_plans:
        plan = find_plan(bundle, kind.name, component, settings.precision)
        if settings.verify_hash:
            store.find(plan.record.key)
        graph, path, target = bundle.graph(component, plan.form), store.path(plan.record), plan.record.target
    else:
        form, graph = choose_graph(_component(bundle, component), kind.name, kind.graph_precision(settings.precision))
        path = bundle.graph_path(component, form)
    exchange = kind.switchable and settings.switchable and not weights
    files = bundle.manifest.files
    return EngineArguments(
        component,
        path,
        graph.inputs,
        graph.outputs,
        settings.precision,
        settings.threads,
        settings.low_memory,
        _fixed_lengths(bundle, component, graph, settings.fixed_size) if kind.compiles else {},
        weights,
        exchangeable_weights(bundle, component, graph, family_of(bundle.manifest)) if exchange else (),
        files[graph.file].sha256,
        {name: files[name].sha256 for name in graph.external},
        store if kind.compiles and settings.engine_cache != "off" else None,
        keep_compiled=settings.engine_cache == "write",
        must_keep=must_keep,
        target=target,
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
        known["batch"] = 1  # texts come one by one, and so do the images that CLIP looks at
    elif component.endswith("_step") or component in ("vae_decoder", TINY_DECODER):
        known["batch"] = size.images
    if "prompt_syntax" in family_of(bundle.manifest).options:  # one chunk of tokens; others choose a text's length
        known["text_length"] = max(tokenizer.max_length for tokenizer in bundle.manifest.tokenizers.values())
    symbols = {length for spec in graph.inputs for length in spec.shape}
    return {symbol: length for symbol, length in known.items() if symbol in symbols}


def make_engine(bundle: Bundle, component: str, settings: EngineSettings, weights: Weights = None) -> Engine:
    """The engine of one component, not yet opened.

    Args:
        bundle: The bundle.
        component: Part of the model.
        settings: How to open it.
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
    engine = kind_of(settings.name).make(engine_arguments(bundle, component, settings, weights))
    if isinstance(engine, BaseEngine):
        graphs = bundle.manifest.components[component].graphs.values()
        # A figure stands beside every graph that was compared with its source when the bundle was built.
        engine.loose_outputs = not all(graph.file in bundle.manifest.quality for graph in graphs)
    return engine


def _component(bundle: Bundle, name: str) -> Component:
    if name not in bundle.manifest.components:
        raise BundleError(f"the bundle has no {name}; it has {', '.join(bundle.manifest.components)}")
    return bundle.manifest.components[name]
