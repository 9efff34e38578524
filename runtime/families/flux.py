"""FLUX.1: a pooled CLIP text, T5's states, and a transformer that takes the scale of guidance, or has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from ..engine_calls import Conditioning, Floats
from ..request.request import Request
from ..text.tokenizers import PromptTokenizer
from .base import Text
from .flow import FlowFamily


class Flux(FlowFamily):
    """Black Forest Labs 2024, https://github.com/black-forest-labs/flux; "dev" takes a scale, "schnell" none."""

    name = "flux"
    denoiser = "transformer"
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    options = frozenset({"prompt_2", "max_sequence_length"})
    settings: ClassVar[Mapping[str, type]] = {"patch": int}
    sequence = 512
    """Default number of T5's tokens, as in diffusers."""

    def sigmas(self, request: Request) -> Sequence[float] | None:
        """Levels from 1 down to 1 / steps, which the shift then moves; solvers have flow levels of their own."""
        return np.linspace(1.0, 1 / request.steps, request.steps).tolist() if request.sampler == "flow-euler" else None

    def texts(self, request: Request, tokenizers: Mapping[str, PromptTokenizer]) -> list[Text]:
        """The prompt for CLIP, of which the pooled state alone is taken, and for T5."""
        prompts = {"text_encoder": request.prompt, "text_encoder_2": request.prompt_2 or request.prompt}
        outputs = {"text_encoder": ("pooler_output",), "text_encoder_2": ("last_hidden_state",)}
        length = request.max_sequence_length or self.sequence
        return [self.tokenize(prompts, outputs, tokenizers, {"text_encoder_2": length})]

    def condition(self, text: Text, encoded: Mapping[str, Mapping[str, Floats]]) -> Conditioning:
        """T5's states, and CLIP's pooled one."""
        return {
            "encoder_hidden_states": encoded["text_encoder_2"]["last_hidden_state"],
            "pooled_projections": encoded["text_encoder"]["pooler_output"],
        }

    def vectors(self, request: Request, *, negative: bool) -> Conditioning:
        """The scale of guidance, if the transformer takes it."""
        return {"guidance_scale": np.array([request.guidance], np.float32)} if self.guidance == "embedded" else {}
