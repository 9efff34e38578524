"""Opening a bundle: the engines of its components, its tokenizers, and the loop around its denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from latentrt.engines import Engine
from latentrt.engines.errors import BundleError, EngineUnavailableError, InvalidRequestError
from latentrt.engines.kinds import KINDS

from ..bundle.manifest import TINY_DECODER, TOKENIZER_FILE
from ..bundle.reader import Bundle
from ..denoising.controlnets import ControlledStepper
from ..denoising.fused import FusedLoop
from ..denoising.loop import Loop
from ..denoising.plain import PlainLoop
from ..denoising.steppers import Stepper
from ..families import Family, family_of
from ..text.textual_inversion import EXTRA_EMBEDDINGS, Embeddings
from ..text.tokenizers import PromptTokenizer, load_tokenizer
from .engine_choice import (
    EngineChoice,
    EngineSettings,
    Weights,
    choose_engine,
    graph_for,
    make_engine,
    most_pictures,
)
from .offloading import OffloadedEngine, Offloader

LOOPS = ("auto", "fused", "plain")
"""Ways to run the denoising loop."""


class MakeStepper(Protocol):
    """Makes a stepper for a bundle."""

    def __call__(
        self, engine: Callable[[str], Engine], components: Collection[str], denoiser: str, *, fused: bool
    ) -> Stepper:
        """Make the stepper.

        Args:
            engine: Gives the opened engine of a component.
            components: Components of the bundle.
            denoiser: The denoiser's component.
            fused: Whether the loop runs in stages.
        """
        ...


STEPPERS: tuple[MakeStepper, ...] = (ControlledStepper,)
"""Steppers that are asked before the denoiser's own whether they take a run's next step; the first is asked first."""


@dataclass(frozen=True)
class OpenedBundle:
    """The opened engines of a bundle, and how they were opened.

    Attributes:
        engines: Opened engines by component.
        choice: The engine that was chosen, and why.
        settings: The settings that they were made with; the engine's name is the chosen one.
        offloader: Opens and closes the engines, if only one may be open at a time.
        max_batch: Most images of one call that compiled plans take; ``None`` where nothing limits them.
    """

    engines: Mapping[str, Engine]
    choice: EngineChoice
    settings: EngineSettings
    offloader: Offloader | None
    max_batch: int | None


def open_bundle(bundle: Bundle, loop: str, settings: EngineSettings) -> OpenedBundle:
    """Choose an engine for a bundle, and open its components with it.

    With the engine ``"auto"``, one that can be seen here and yet does not start is passed over for the next best.

    Args:
        bundle: The bundle.
        loop: One of :data:`LOOPS`.
        settings: How to open the engines.

    Raises:
        BundleError: if the bundle lacks what is asked for.
        EngineUnavailableError: if the engine cannot run here.
        InvalidRequestError: if settings exclude each other.
    """
    if settings.switchable and settings.low_memory:
        raise InvalidRequestError("switchable keeps engines open, and low_memory closes them; give one of the two")
    components = components_for(bundle, loop)
    offloader = Offloader() if settings.low_memory else None
    failed: dict[str, str] = {}
    while True:
        choice = choose_engine(bundle, components, settings, failed)
        if settings.switchable and not KINDS[choice.name].switchable:
            raise InvalidRequestError(f"switchable is for onnxruntime on a CPU, and the engine is {choice.name}")
        chosen = dataclasses.replace(settings, name=choice.name)
        try:
            engines = open_engines(bundle, components, chosen, offloader)
            break
        except EngineUnavailableError as error:
            if settings.name != "auto":
                raise
            failed[choice.name] = str(error)  # there, as far as could be seen, and yet it does not start
    with ExitStack() as stack:
        for engine in engines.values():
            stack.callback(engine.close)
        opened = OpenedBundle(engines, choice, chosen, offloader, most_pictures(bundle, components, chosen))
        stack.pop_all()
    return opened


def open_engines(
    bundle: Bundle,
    components: Sequence[str],
    settings: EngineSettings,
    offloader: Offloader | None,
    weights: Mapping[str, Weights] | None = None,
) -> dict[str, Engine]:
    """Open the engines of components; if one does not open, the others are closed.

    Args:
        bundle: The bundle.
        components: The components.
        settings: How to open them; the name is that of an engine.
        offloader: Opens and closes them, if only one may be open at a time.
        weights: Weights in place of the graph's own: by component, then by name.

    Returns:
        Opened engines by component.

    Raises:
        BundleError: if the bundle lacks what is asked for.
        EngineUnavailableError: if the engine cannot run here.
        EngineError: if an engine does not open.
    """
    changed = weights or {}
    engines = {
        component: make_engine(bundle, component, settings, *([changed[component]] if component in changed else []))
        for component in components
    }
    if offloader is not None:
        if weights is None:
            engines[components[0]].open().close()  # whether the engine starts here at all shows now
        graphs = {component: graph_for(bundle, component, settings) for component in components}
        return {name: OffloadedEngine(engine, graphs[name], offloader, name).open() for name, engine in engines.items()}
    if KINDS[settings.name].needs_plans:
        from latentrt.engines.trt.session import share_arena  # what only plans need is loaded for plans

        share_arena(engines.values())  # one component runs at a time
    with ExitStack() as stack:
        for engine in engines.values():
            stack.callback(engine.open().close)
        stack.pop_all()
    return engines


def components_for(bundle: Bundle, loop: str = "auto") -> tuple[str, ...]:
    """Components that every pipeline opens, for a way to run the loop.

    Args:
        bundle: The bundle.
        loop: One of :data:`LOOPS`.

    Raises:
        BundleError: if the bundle lacks the stages of a fused loop.
    """
    there, family = bundle.manifest.components, family_of(bundle.manifest)
    stages = family.stages()
    if loop == "fused" and stages[-1] not in there:
        raise BundleError(f"{bundle.path} holds no stages of its denoiser; build it again, or run the loop plain")
    whole = loop == "plain" or stages[-1] not in there
    denoiser = [family.denoiser] if whole else [stage for stage in stages if stage in there]
    decoders = [*family.decoders, *([TINY_DECODER] if TINY_DECODER in there else [])]
    return (*family.text_encoders, *denoiser, *decoders)


def embedding_widths(engines: Mapping[str, Engine], family: Family) -> dict[str, int]:
    """Widths of the vectors that text encoders take, by component; those that take none are left out."""
    specs = {name: engines[name].inputs.get(EXTRA_EMBEDDINGS) for name in family.text_encoders}
    return {name: int(spec.shape[1]) for name, spec in specs.items() if spec is not None}


def load_tokenizers(bundle: Bundle, family: Family, embeddings: Embeddings) -> dict[str, PromptTokenizer]:
    """The tokenizers that a family's text encoders need, by name, with the words of embeddings added.

    Raises:
        BundleError: if the bundle lacks one, or it is damaged.
    """
    tokenizers = {}
    for name in {family.encoders[encoder]: None for encoder in family.text_encoders}:
        if name not in bundle.manifest.tokenizers:
            raise BundleError(f"{bundle.path} has no tokenizer named {name!r}, which its text encoders need")
        settings = bundle.manifest.tokenizers[name]
        bundle.file(f"{settings.directory}/{TOKENIZER_FILE}")
        tokenizers[name] = load_tokenizer(
            bundle.path / settings.directory, settings.kind, settings.max_length, settings.pad_token_id
        )
    for encoder, words in embeddings.ids.items():
        name = family.encoders[encoder]
        tokenizers[name] = tokenizers[name].with_words(words)
    return tokenizers


def make_loop(
    engines: Mapping[str, Engine],
    family: Family,
    max_batch: int | None,
    engine: Callable[[str], Engine] | None = None,
) -> Loop:
    """The loop that engines are for: in stages where they are open, or else around the whole denoiser.

    Args:
        engines: Opened engines by component.
        family: The bundle's family.
        max_batch: Most images of one call of the denoiser; ``None`` sets no limit.
        engine: Gives the opened engine of a component, for the steppers that need more; ``None`` gives those of
            ``engines``.
    """
    denoiser = family.denoiser
    prompt, schedule, step = (engines.get(stage) for stage in family.stages())
    loop: Loop
    if step is None:
        loop = PlainLoop(engines[denoiser], denoiser, max_batch)
    else:
        loop = FusedLoop(step, prompt, schedule, denoiser, max_batch)
    for make in reversed(STEPPERS):
        components = family.manifest.components
        loop.add_stepper(make(engine or engines.__getitem__, components, denoiser, fused=step is not None))
    return loop
