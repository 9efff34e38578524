"""The base class of families: everything that the runtime asks of one, from texts to the shape of its latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import BundleError, InvalidRequestError

from ..bundle.manifest import STAGES, Manifest
from ..engine_calls import Conditioning, Floats
from ..request.request import Request
from ..samplers import Plan
from ..text.chunks import cut, joined
from ..text.tokenizers import PromptTokenizer

GUIDANCE = ("classifier-free", "embedded", "none")
"""Where the scale of guidance acts: between two predictions, as an input of the denoiser, or nowhere."""

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Text:
    """One side of guidance, tokenised.

    Attributes:
        tokens: Token ids by text encoder, int64 ``[chunks, length]``; empty where no encoder is needed.
        outputs: By text encoder, names of the outputs that are taken of it.
        truncated: Tokens that did not fit and were cut off.
        absent: Length in tokens of the zeros that stand for an encoder that the bundle does not have, or for a text
            that is not encoded; 0 is the tokenizers' own length.
        weights: By text encoder the factors on the states of its tokens, float32 ``[chunks, length]``; no entry where
            all are 1.
    """

    tokens: Mapping[str, NDArray[np.int64]]
    outputs: Mapping[str, Sequence[str]]
    truncated: int = 0
    absent: int = 0
    weights: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """A key that is equal for texts with equal encodings."""
        tokens = tuple((name, tuple(self.outputs[name]), ids.tobytes()) for name, ids in self.tokens.items())
        return tokens, self.absent, tuple((name, weights.tobytes()) for name, weights in self.weights.items())

    def joined(self, name: str, states: Floats) -> Floats:
        """The states of all chunks side by side, weighted: ``[1, chunks * length, width]``.

        Args:
            name: The text encoder.
            states: Its states, ``[chunks, length, width]``.
        """
        return joined(states, self.weights.get(name))


class Family(ABC):
    """A family, for one bundle of it. Immutable, so one serves all threads.

    Args:
        manifest: The bundle's.

    Raises:
        BundleError: if its settings are not those of the family.

    Attributes:
        manifest: The bundle's.
    """

    name: ClassVar[str]
    """Its name in a manifest."""
    denoiser: ClassVar[str]
    """The denoiser's component; its stages are named after it."""
    encoders: ClassVar[Mapping[str, str]]
    """Text encoders, and the tokenizer of each."""
    tasks: ClassVar[tuple[str, ...]] = ("text-to-image",)
    """The tasks that its models were trained for."""
    output_kind: ClassVar[str] = "image"
    """The output that its latents are decoded to: a key of :data:`latentrt.runtime.output.kinds.OUTPUT_KINDS`."""
    decoders: ClassVar[tuple[str, ...]] = ("vae_decoder",)
    """Components that decode its latents; they are opened with every pipeline."""
    strength: ClassVar[float] = 0.8
    """How much an image of a request is changed unless the request says so, as in diffusers."""
    options: frozenset[str] = frozenset()
    """Options of a request that not every family has, and this one does: of
    :data:`latentrt.runtime.request.options.FAMILY_OPTIONS`."""
    settings: ClassVar[Mapping[str, type]] = {}
    """The entries of a manifest's ``settings`` besides ``guidance``, with their types; all are required."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        expected = {"guidance": str, **self.settings}
        if set(manifest.settings) != set(expected):
            raise BundleError(
                f"the manifest's settings are {', '.join(sorted(manifest.settings)) or 'empty'}, expected "
                f"{', '.join(sorted(expected))} for the family {self.name}; build the bundle again"
            )
        for name, kind in expected.items():
            if type(manifest.settings[name]) is not kind:
                raise BundleError(f"settings.{name} is {manifest.settings[name]!r}, expected {_KINDS[kind]}")
        if self.guidance not in GUIDANCE:
            raise BundleError(f"settings.guidance is {self.guidance!r}, expected one of {', '.join(GUIDANCE)}")

    @property
    def guidance(self) -> str:
        """One of :data:`GUIDANCE`."""
        return str(self.manifest.settings["guidance"])

    @classmethod
    def stages(cls) -> tuple[str, str, str]:
        """Components that the denoiser is split into: prompt, schedule and step."""
        prompt, schedule, step = (f"{cls.denoiser}_{stage}" for stage in STAGES)
        return prompt, schedule, step

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Components that encode texts, in the order in which they run."""
        return tuple(self.encoders)

    @property
    def size_multiple(self) -> int:
        """Pixels that width and height are multiples of."""
        return self.manifest.latent.vae_scale_factor

    @property
    def longest(self) -> int | None:
        """Most pixels that width or height may have; ``None`` is as many as any request."""
        return None

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """The shape of a request's latents: images, channels, height and width, or whatever the family has.

        The first dimension is the number of images (or of clips, or of sounds) of the request.
        """
        latent = self.manifest.latent
        factor = latent.vae_scale_factor
        return request.images, latent.channels, request.height // factor, request.width // factor

    def options_of_latents(self, shape: Sequence[int]) -> dict[str, int]:
        """Options of a request whose latents have a shape: the inverse of :meth:`latent_shape`, without the number.

        Args:
            shape: The shape of the latents that a caller gives, the number of images first.

        Returns:
            By the name of each option that the shape decides, its value: ``height`` and ``width`` in pixels.

        Raises:
            InvalidRequestError: if no request of this model has such latents.
        """
        latent = self.manifest.latent
        factor = latent.vae_scale_factor
        if len(shape) != 4 or shape[1] != latent.channels:
            raise InvalidRequestError(
                f"latents have the shape {list(shape)}, expected [images, {latent.channels}, height / {factor}, "
                f"width / {factor}]"
            )
        return {"height": shape[2] * factor, "width": shape[3] * factor}

    def plan(self, request: Request) -> Plan:
        """The sampler's plan for a request.

        Raises:
            InvalidRequestError: if the sampler cannot do what is asked.
        """
        return request.compile_plan(self.manifest.scheduler, skipped_steps=self.skipped_steps(request))

    def skipped_steps(self, request: Request) -> int:
        """Steps to leave out, so as to change the request's image no more than its strength says."""
        if request.strength is None:
            return 0
        return request.steps - min(int(request.steps * request.strength), request.steps)

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser was made for inpainting: it takes the mask, and the image outside of it, as inputs."""
        denoiser = self.manifest.components.get(self.denoiser)
        graphs = () if denoiser is None else denoiser.graphs.values()
        return any(spec.name == "inpaint" for graph in graphs for spec in graph.inputs)

    def abilities(self) -> dict[str, Any]:
        """The kind of guidance, the settings, and the request options that only some families have."""
        return {**self.manifest.settings, "options": sorted(self.options)}

    def check(self, request: Request) -> None:  # noqa: B027 - most families have nothing to add
        """Refuse what the family cannot do; every value was found to be one that some family takes before.

        Raises:
            InvalidRequestError: naming the first option that does not fit.
        """

    @abstractmethod
    def texts(self, request: Request, tokenizers: Mapping[str, PromptTokenizer]) -> list[Text]:
        """The texts of a request, tokenised: the unconditional one first if the request is guided, the prompt last.

        Args:
            request: The request.
            tokenizers: Those of the bundle, by name.

        Raises:
            InvalidRequestError: if a text cannot be tokenised.
        """

    @abstractmethod
    def condition(self, text: Text, encoded: Mapping[str, Mapping[str, Floats]]) -> Conditioning:
        """The denoiser's inputs that follow from a text alone; they are cached by the text.

        Args:
            text: The text.
            encoded: By text encoder the outputs that :attr:`Text.outputs` names.
        """

    def vectors(self, request: Request, *, negative: bool) -> Conditioning:
        """The denoiser's inputs that follow from the rest of the request, one row each.

        Args:
            request: The request.
            negative: Whether they are for the unconditional half.
        """
        return {}

    def embedded_guidance(self, request: Request) -> Conditioning:
        """The scale of guidance for a U-Net that takes it in as ``timestep_cond``; nothing for any other.

        Sines and cosines of 1000 times the scale above 1, at falling frequencies, in float32 as diffusers computes them
        (Meng et al. 2023, arXiv 2210.03142; Luo et al. 2023, arXiv 2310.04378).
        """
        if self.guidance != "embedded":
            return {}
        width = self.zeros("timestep_cond").shape[-1]
        half = width // 2
        exponents = np.arange(half, dtype=np.float32) * -(np.log(np.float32(10000)) / np.float32(half - 1))
        angles = np.float32(request.guidance - 1) * np.float32(1000) * np.exp(exponents)
        embedding = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2, np.float32)])
        return {"timestep_cond": embedding[None]}

    def gives(self, component: str, output: str) -> bool:
        """Whether every graph of a component has an output. Graphs that others exported lack some of ours."""
        graphs = self.manifest.components[component].graphs.values() if component in self.manifest.components else ()
        return all(any(spec.name == output for spec in graph.outputs) for graph in graphs)

    def zeros(self, name: str, tokens: int = 0) -> Floats:
        """One row of zeros for an input of the denoiser, which stands for no text at all.

        Args:
            name: The input.
            tokens: The length of a text, for a length that the graph leaves open; 0 is the tokenizers' own.

        Raises:
            BundleError: if the denoiser has no such input.
        """
        lengths = [n if isinstance(n, int) else tokens or self._tokens() for n in self.shape_of(name)[1:]]
        return np.zeros([1, *lengths], np.float32)

    def shape_of(self, name: str) -> tuple[int | str, ...]:
        """The symbolic shape of an input of the denoiser.

        Raises:
            BundleError: if it has no such input.
        """
        for graph in self.manifest.components[self.denoiser].graphs.values():
            for spec in graph.inputs:
                if spec.name == name:
                    return spec.shape
        raise BundleError(f"{self.denoiser} has no input {name!r}; build the bundle again")

    def _tokens(self) -> int:
        """Length of an encoded text."""
        return max(tokenizer.max_length for tokenizer in self.manifest.tokenizers.values())

    def tokenize(
        self,
        prompts: Mapping[str, str],
        outputs: Mapping[str, Sequence[str]],
        tokenizers: Mapping[str, PromptTokenizer],
        lengths: Mapping[str, int] | None = None,
        syntax: str = "plain",
    ) -> Text:
        """Tokenise a text for every text encoder.

        Args:
            prompts: By text encoder its prompt.
            outputs: By text encoder the outputs to take.
            tokenizers: Those of the bundle, by name.
            lengths: By text encoder the number of tokens, where it is not the tokenizer's own.
            syntax: How the prompts are read, one of :data:`latentrt.runtime.text.chunks.SYNTAXES`.
        """
        tokens, weights, truncated = {}, {}, 0
        for encoder, prompt in prompts.items():
            tokenizer = tokenizers[self.encoders[encoder]]
            if syntax != "plain":
                chunks = cut(prompt, syntax, tokenizer)
                tokens[encoder], truncated = chunks.tokens, max(truncated, chunks.truncated)
                if chunks.weights is not None:
                    weights[encoder] = chunks.weights
                continue
            length = (lengths or {}).get(encoder, tokenizer.max_length)
            tokens[encoder] = tokenizer.encode(prompt, length)[None]
            truncated = max(truncated, tokenizer.count(prompt) - length)
        return Text(tokens, outputs, truncated, weights=weights)

    def pad_to_same_chunks(self, texts: Sequence[Text], tokenizers: Mapping[str, PromptTokenizer]) -> list[Text]:
        """Pad texts to the same number of chunks, since both sides of guidance share a call of the denoiser.

        The padding is chunks of an empty prompt.

        Raises:
            InvalidRequestError: if there are several chunks, and the denoiser takes but one.
        """
        most = max((len(ids) for text in texts for ids in text.tokens.values()), default=1)
        if most == 1:
            return list(texts)
        if isinstance(length := self.shape_of("encoder_hidden_states")[1], int):
            raise InvalidRequestError(
                f"the prompt takes {most} chunks of tokens, but the {self.denoiser} of this bundle takes {length} "
                "tokens alone; give a shorter prompt, or build the bundle again"
            )
        return [self._padded(text, most, tokenizers) for text in texts]

    def _padded(self, text: Text, count: int, tokenizers: Mapping[str, PromptTokenizer]) -> Text:
        if not text.tokens:
            return replace(text, absent=count * self._tokens())
        tokens, weights = {}, {}
        for name, ids in text.tokens.items():
            empty = tokenizers[self.encoders[name]].encode("")
            tokens[name] = np.concatenate([ids, np.tile(empty, (count - len(ids), 1))])
            if name in text.weights:
                own = text.weights[name]
                weights[name] = np.concatenate([own, np.ones((count - len(own), len(empty)), np.float32)])
        return replace(text, tokens=tokens, weights=weights)
