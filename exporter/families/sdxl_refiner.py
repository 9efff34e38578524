"""Stable Diffusion XL, refiner: one CLIP text encoder, and a U-Net that takes size, crop and an aesthetic score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from latentrt.engines.errors import SourceError

from ..components import Checkpoint
from .base import Part, TokenizerPart
from .parts import CLIP_TOKENIZERS, UNET, VAE
from .sdxl import CLIP_TEXT_PROJECTED, StableDiffusionXl


class StableDiffusionXlRefiner(StableDiffusionXl):
    """Podell et al. 2023, arXiv 2307.01952, section 2.5."""

    name = "stable-diffusion-xl-refiner"
    controllable = False
    pipelines = ("StableDiffusionXLImg2ImgPipeline",)
    parts: ClassVar[Mapping[str, Part]] = {"text_encoder_2": CLIP_TEXT_PROJECTED, "unet": UNET, "vae": VAE}
    tokenizers: ClassVar[Mapping[str, TokenizerPart]] = {
        "tokenizer_2": TokenizerPart(CLIP_TOKENIZERS, "text_encoder_2")
    }
    components: ClassVar[tuple[str, ...]] = ("text_encoder_2", "unet", "vae_decoder", "vae_encoder")
    time_ids = 5  # height and width of the original, top and left of the crop, the score

    def settings(self, checkpoint: Checkpoint) -> dict[str, bool | int | float | str]:
        """Settings of the base model.

        Raises:
            SourceError: if the pipeline gives its U-Net no aesthetic score, as that of no refiner does.
        """
        scored = checkpoint.index.get("requires_aesthetics_score", False)
        if scored is not True:
            raise SourceError(
                f"model_index.json of {checkpoint.name}: 'requires_aesthetics_score' is {scored!r}, but the refiner of "
                "Stable Diffusion XL has true; the base model's '_class_name' is StableDiffusionXLPipeline"
            )
        return super().settings(checkpoint)
