"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, whose states the U-Net attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..bundle.manifest import Manifest
from ..engine_calls import Conditioning, Floats
from ..request.request import Request
from ..samplers import Plan
from ..text.tokenizers import PromptTokenizer
from .base import Family, Text

_PENULTIMATE = "penultimate_hidden_state"


class StableDiffusion(Family):
    """Rombach et al. 2022, arXiv 2112.10752."""

    name = "stable-diffusion"
    denoiser = "unet"
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    options = frozenset({"negative_prompt", "clip_skip", "prompt_syntax"})

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        if not self.gives("text_encoder", _PENULTIMATE):
            self.options -= {"clip_skip"}

    def plan(self, request: Request) -> Plan:
        """The sampler's plan; of a latent consistency model with all steps among fewer timesteps, as in diffusers."""
        if request.strength is None or self.guidance != "embedded" or request.sampler not in ("lcm", "tcd"):
            return super().plan(request)
        return request.compile_plan(self.manifest.scheduler, strength=request.strength)

    def texts(self, request: Request, tokenizers: Mapping[str, PromptTokenizer]) -> list[Text]:
        """The texts; as in diffusers, ``clip_skip`` is for the prompt, and all layers encode the negative prompt."""
        state = _PENULTIMATE if request.clip_skip else "last_hidden_state"
        wanted = [(request.prompt, state)]
        if request.guided:
            wanted.insert(0, (request.negative_prompt, "last_hidden_state"))
        found = [
            self.tokenize(
                {"text_encoder": prompt}, {"text_encoder": (output,)}, tokenizers, syntax=request.prompt_syntax
            )
            for prompt, output in wanted
        ]
        return self.pad_to_same_chunks(found, tokenizers)

    def vectors(self, request: Request, *, negative: bool) -> Conditioning:
        """The embedded scale of guidance, for a latent consistency model."""
        return self.embedded_guidance(request)

    def condition(self, text: Text, encoded: Mapping[str, Mapping[str, Floats]]) -> Conditioning:
        """The encoder's states."""
        (states,) = encoded["text_encoder"].values()
        return {"encoder_hidden_states": text.joined("text_encoder", states)}
