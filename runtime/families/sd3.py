"""Stable Diffusion 3 and 3.5: two CLIP text encoders, a T5 that may be missing, and a transformer over both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from latentrt.engines.errors import BundleError, InvalidRequestError

from ..engine_calls import Conditioning, Floats
from ..request.request import Request
from ..text.tokenizers import PromptTokenizer
from .base import Text
from .flow import FlowFamily

_STATE, _EARLIER_STATE = "penultimate_hidden_state", "antepenultimate_hidden_state"
_CLIP, _T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"


class StableDiffusion3(FlowFamily):
    """Esser et al. 2024, arXiv 2403.03206."""

    name = "stable-diffusion-3"
    denoiser = "transformer"
    encoders: ClassVar[Mapping[str, str]] = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        "text_encoder_3": "tokenizer_3",
    }
    options = frozenset(
        {"negative_prompt", "clip_skip", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3"}
        | {"max_sequence_length"}
    )
    settings: ClassVar[Mapping[str, type]] = {"t5": bool, "patch": int, "largest_side": int}
    sequence = 256
    """Default number of T5's tokens, as in diffusers."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Both CLIPs, and T5 where the model has it."""
        return (*_CLIP, _T5) if self.manifest.settings["t5"] else _CLIP

    @property
    def longest(self) -> int:
        """The longest side that the trained positions reach."""
        return int(self.manifest.settings["largest_side"])

    def check(self, request: Request) -> None:
        """Refuse sizes beyond the trained positions, and a third prompt where there is no third encoder."""
        for side in ("width", "height"):
            if getattr(request, side) > self.longest:
                raise InvalidRequestError(
                    f"{side} is {getattr(request, side)}, expected at most {self.longest}, as far as the positions of "
                    "this model reach"
                )
        for option in ("prompt_3", "negative_prompt_3"):
            if getattr(request, option) and not self.manifest.settings["t5"]:
                raise InvalidRequestError(
                    f"{option} is for T5, which this bundle was built without; leave it out, or build a bundle from a "
                    "source with text_encoder_3"
                )

    def texts(self, request: Request, tokenizers: Mapping[str, PromptTokenizer]) -> list[Text]:
        """Three prompts for three encoders; as in diffusers, ``clip_skip`` is for the prompt alone."""
        length = request.max_sequence_length or self.sequence
        prompts = (request.prompt, request.prompt_2, request.prompt_3)
        state = _EARLIER_STATE if request.clip_skip else _STATE
        found = [self._text(*prompts, state, length, tokenizers)]
        if request.guided:
            negatives = (request.negative_prompt, request.negative_prompt_2, request.negative_prompt_3)
            found.insert(0, self._text(*negatives, _STATE, length, tokenizers))
        return found

    def _text(
        self,
        first: str,
        second: str | None,
        third: str | None,
        state: str,
        length: int,
        tokenizers: Mapping[str, PromptTokenizer],
    ) -> Text:
        prompts = dict(zip(_CLIP, (first, second or first), strict=True))
        outputs: dict[str, tuple[str, ...]] = dict.fromkeys(_CLIP, (state, "text_embeds"))
        if _T5 not in self.text_encoders:
            text = self.tokenize(prompts, outputs, tokenizers)
            return Text(text.tokens, text.outputs, text.truncated, absent=length)
        prompts[_T5], outputs[_T5] = third or first, ("last_hidden_state",)
        return self.tokenize(prompts, outputs, tokenizers, {_T5: length})

    def condition(self, text: Text, encoded: Mapping[str, Mapping[str, Floats]]) -> Conditioning:
        """CLIP's states side by side, widened with zeros, then T5's or zeros; and CLIP's pooled states side by side."""
        width = self.shape_of("encoder_hidden_states")[-1]
        if not isinstance(width, int):
            raise BundleError(f"the width of {self.denoiser}'s text varies, expected one; build the bundle again")
        states = [next(v for n, v in encoded[name].items() if n != "text_embeds") for name in _CLIP]
        clip = np.concatenate(states, axis=-1)
        clip = np.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1])))
        t5 = np.zeros((1, text.absent, width), np.float32) if text.absent else encoded[_T5]["last_hidden_state"]
        return {
            "encoder_hidden_states": np.concatenate([clip, t5], axis=1),
            "pooled_projections": np.concatenate([encoded[name]["text_embeds"] for name in _CLIP], axis=-1),
        }
