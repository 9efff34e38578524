"""Stable Diffusion XL, base model: two CLIP text encoders, and a U-Net that takes sizes and a crop as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from latentrt.engines.errors import InvalidRequestError

from ..engine_calls import Conditioning, Floats
from ..request.request import Request
from ..text.tokenizers import PromptTokenizer
from .base import Family, Text

_STATES = ("penultimate_hidden_state", "antepenultimate_hidden_state")
_NEGATIVE = ("negative_original_size", "negative_target_size")


class StableDiffusionXl(Family):
    """Podell et al. 2023, arXiv 2307.01952."""

    name = "stable-diffusion-xl"
    denoiser = "unet"
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    options = frozenset(
        {"negative_prompt", "clip_skip", "prompt_2", "negative_prompt_2", "prompt_syntax"}
        | {"original_size", "crop", "target_size", "negative_crop", *_NEGATIVE}
    )
    strength = 0.3
    settings: ClassVar[Mapping[str, type]] = {"force_zeros_for_empty_prompt": bool}

    def check(self, request: Request) -> None:
        """Refuse one size to steer away from without the other, which diffusers ignores."""
        given = [name for name in (*_NEGATIVE, "negative_crop") if getattr(request, name) is not None]
        for name in _NEGATIVE:
            if given and name not in given:
                raise InvalidRequestError(f"{given[0]} is given without {name}; give both or neither")

    def texts(self, request: Request, tokenizers: Mapping[str, PromptTokenizer]) -> list[Text]:
        """Both prompts for both encoders; as in diffusers, ``clip_skip`` is for the prompt alone.

        A missing negative prompt is zeros instead of an encoded empty text, if the model was trained so.
        """
        syntax = request.prompt_syntax
        found = [self._text(request.prompt, request.prompt_2, 1 if request.clip_skip else 0, tokenizers, syntax)]
        if request.guided:
            empty = not (request.negative_prompt or request.negative_prompt_2)
            zeros = empty and self.manifest.settings["force_zeros_for_empty_prompt"]
            negative = (request.negative_prompt, request.negative_prompt_2)
            found.insert(0, Text({}, {}) if zeros else self._text(*negative, 0, tokenizers, syntax))
        return self.pad_to_same_chunks(found, tokenizers)

    def _text(
        self,
        first: str,
        second: str | None,
        skipped: int,
        tokenizers: Mapping[str, PromptTokenizer],
        syntax: str,
    ) -> Text:
        prompts = {"text_encoder": first, "text_encoder_2": second or first}
        outputs: dict[str, tuple[str, ...]] = {name: (self._state(name, skipped),) for name in prompts}
        outputs["text_encoder_2"] += ("text_embeds",)
        return self.tokenize(prompts, outputs, tokenizers, syntax=syntax)

    def _state(self, encoder: str, skipped: int) -> str:
        """The output with the states before the last layer, or ``skipped`` layers earlier."""
        own = _STATES[skipped]
        if self.gives(encoder, own):
            return own
        # Optimum's graphs have the states before and behind every layer.
        graph = next(iter(self.manifest.components[encoder].graphs.values()))
        count = sum(spec.name.startswith("hidden_states.") for spec in graph.outputs)
        return f"hidden_states.{count - 2 - skipped}"

    def condition(self, text: Text, encoded: Mapping[str, Mapping[str, Floats]]) -> Conditioning:
        """The states of both encoders side by side, and the pooled state of the second, of the text's first chunk."""
        if not encoded:
            return {name: self.zeros(name, text.absent) for name in ("encoder_hidden_states", "text_embeds")}
        states = [
            text.joined(encoder, values)
            for encoder, outputs in encoded.items()
            for name, values in outputs.items()
            if name != "text_embeds"
        ]
        return {
            "encoder_hidden_states": np.concatenate(states, axis=-1),
            "text_embeds": encoded["text_encoder_2"]["text_embeds"][:1],
        }

    def vectors(self, request: Request, *, negative: bool) -> Conditioning:
        """Original size, crop and target size, each down before across; the guidance of a latent consistency model."""
        own = (request.width, request.height)
        original, crop, target = request.original_size, request.crop, request.target_size
        if negative and request.negative_original_size:
            original, crop, target = (
                request.negative_original_size,
                request.negative_crop,
                request.negative_target_size,
            )
        pairs = (original or own, crop or (0, 0), target or own)
        ids = np.array([[length for pair in pairs for length in reversed(pair)]], np.float32)
        return {"time_ids": ids, **self.embedded_guidance(request)}
