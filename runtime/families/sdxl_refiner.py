"""Stable Diffusion XL, refiner: one CLIP text encoder, and a U-Net that takes a size, a crop and an aesthetic score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ..engine_calls import Conditioning
from ..request.request import Request
from ..text.tokenizers import PromptTokenizer
from .base import Text
from .sdxl import StableDiffusionXl

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""Default aesthetic scores of the prompt and of the negative prompt, as in diffusers."""


class StableDiffusionXlRefiner(StableDiffusionXl):
    """Podell et al. 2023, arXiv 2307.01952, section 2.5: trained on the last fifth of the noise levels alone."""

    name = "stable-diffusion-xl-refiner"
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder_2": "tokenizer_2"}
    options = frozenset(
        {"negative_prompt", "clip_skip", "original_size", "crop", "negative_original_size", "negative_crop"}
        | {"aesthetic_score", "negative_aesthetic_score", "prompt_syntax"}
    )

    def check(self, request: Request) -> None:
        """Refuse nothing: the negative half always has a crop and a score of its own."""

    def _text(
        self,
        first: str,
        second: str | None,
        skipped: int,
        tokenizers: Mapping[str, PromptTokenizer],
        syntax: str,
    ) -> Text:
        outputs = {"text_encoder_2": (self._state("text_encoder_2", skipped), "text_embeds")}
        return self.tokenize({"text_encoder_2": first}, outputs, tokenizers, syntax=syntax)

    def vectors(self, request: Request, *, negative: bool) -> Conditioning:
        """Original size and crop, each down before across, and a score.

        As in diffusers, the negative half has the crop (0, 0) unless it is given one, whatever that of the prompt.
        """
        own = (request.width, request.height)
        original, crop = request.original_size or own, request.crop
        score, usual = request.aesthetic_score, AESTHETIC_SCORE
        if negative:
            original, crop = request.negative_original_size or original, request.negative_crop
            score, usual = request.negative_aesthetic_score, NEGATIVE_AESTHETIC_SCORE
        lengths = [float(length) for pair in (original, crop or (0, 0)) for length in reversed(pair)]
        ids = np.array([[*lengths, usual if score is None else score]], np.float32)
        return {"time_ids": ids, **self.embedded_guidance(request)}
