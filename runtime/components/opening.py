"""Opening what a bundle holds: engines of its components, tokenizers, and the loop around the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from latentrt.engines import Engine
from latentrt.engines.errors import BundleError
from latentrt.engines.trt import share_arena

from ..bundle.manifest import TINY_DECODER, TOKENIZER_FILE
from ..bundle.reader import Bundle
from ..denoising.fused import FusedLoop
from ..denoising.loop import Loop
from ..denoising.plain import PlainLoop
from ..families import Family, family_of
from ..text.textual_inversion import EXTRA_EMBEDDINGS, Embeddings
from ..text.tokenizers import PromptTokenizer, load_tokenizer
from .engine_choice import EngineSettings, Weights, graph_for, make_engine
from .offloading import OffloadedEngine, Offloader


def open_engines(
    bundle: Bundle,
    components: Sequence[str],
    settings: EngineSettings,
    turns: Offloader | None,
    weights: Mapping[str, Weights] | None = None,
) -> dict[str, Engine]:
    """Opened engines by component; if one does not open, the others are closed."""
    changed = weights or {}
    engines = {
        component: make_engine(bundle, component, settings, *([changed[component]] if component in changed else []))
        for component in components
    }
    if turns is not None:
        if weights is None:
            engines[components[0]].open().close()  # whether the engine starts here at all shows now
        graphs = {component: graph_for(bundle, component, settings) for component in components}
        return {name: OffloadedEngine(engine, graphs[name], turns, name).open() for name, engine in engines.items()}
    share_arena(engines.values())  # one component runs at a time
    with ExitStack() as stack:
        for engine in engines.values():
            stack.callback(engine.open().close)
        stack.pop_all()
    return engines


def components_for(bundle: Bundle, loop: str = "auto") -> tuple[str, ...]:
    """Components to open for a way to run the loop."""
    there, family = bundle.manifest.components, family_of(bundle.manifest)
    stages = family.stages()
    if loop == "fused" and stages[-1] not in there:
        raise BundleError(f"{bundle.path} holds no stages of its denoiser; build it again, or run the loop plain")
    whole = loop == "plain" or stages[-1] not in there
    denoiser = [family.denoiser] if whole else [stage for stage in stages if stage in there]
    decoders = ["vae_decoder", *([TINY_DECODER] if TINY_DECODER in there else [])]
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
            raise BundleError(f"{bundle.path} has no tokenizer named {name!r}, which text to image needs")
        settings = bundle.manifest.tokenizers[name]
        bundle.file(f"{settings.directory}/{TOKENIZER_FILE}")
        tokenizers[name] = load_tokenizer(
            bundle.path / settings.directory, settings.kind, settings.max_length, settings.pad_token_id
        )
    for encoder, words in embeddings.ids.items():
        name = family.encoders[encoder]
        tokenizers[name] = tokenizers[name].with_words(words)
    return tokenizers


def make_loop(engines: Mapping[str, Engine], family: Family, max_batch: int | None) -> Loop:
    """The loop that these engines are for: in stages where they are there, or else around the whole denoiser.

    Args:
        engines: Opened engines by component.
        family: The bundle's family.
        max_batch: Most pictures that one call of the denoiser is given; ``None`` sets no limit.
    """
    denoiser = family.denoiser
    prompt, schedule, step = (engines.get(stage) for stage in family.stages())
    if step is None:
        return PlainLoop(engines[denoiser], denoiser, max_batch)
    return FusedLoop(step, prompt, schedule, denoiser, max_batch)
