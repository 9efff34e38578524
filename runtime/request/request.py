"""One request, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..images.reading import PictureRecord
from ..lora.reading import AppliedLora
from ..samplers import Plan, compile_plan
from ..text.textual_inversion import RecordedFile
from ..vae.tiling import Tiling
from .control import Control


@dataclass(frozen=True)
class Request:
    """A request with every default filled in.

    Besides the following it has a field for each option of a request, with the option's name and meaning: see
    :data:`latentrt.runtime.request.options.OPTIONS`. Images are kept as records, sequences as tuples.

    Attributes:
        prompt: Text to draw; what exceeds the tokenizer's length is cut off.
        classifier_free: Whether guidance comes from a second prediction, for the negative prompt. If not, the model
            takes the scale of guidance as an input, or knows none.
        embeddings: Words of the pipeline with vectors from files; a pipeline fills this in.
        loras: LoRAs that were on while the images were drawn, in their order; a pipeline fills this in.
    """

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    sampler: str
    width: int
    height: int
    images: int
    clip_skip: int
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_rescale: float = 0.0
    eta: float | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    output: str = "image"
    decoder: str = "full"
    prompt_3: str | None = None
    negative_prompt_3: str | None = None
    max_sequence_length: int | None = None
    prompt_syntax: str = "plain"
    vae_tiling: Tiling | None = None
    image: PictureRecord | None = None
    mask: PictureRecord | None = None
    strength: float | None = None
    resize: str | None = None
    mask_blur: float | None = None
    mask_padding: int | None = None
    keep_outside: bool | None = None
    variation_seed: int | None = None
    variation_strength: float | None = None
    control: tuple[Control, ...] = ()
    guess_mode: bool = False
    ip_adapter_image: PictureRecord | None = None
    ip_adapter_scale: float | None = None
    safety: str = "off"
    classifier_free: bool = True
    embeddings: tuple[RecordedFile, ...] = ()
    loras: tuple[AppliedLora, ...] = ()

    def compile_plan(
        self,
        scheduler: Mapping[str, Any],
        *,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        skipped_steps: int = 0,
        strength: float | None = None,
    ) -> Plan:
        """Compile the sampler's plan for this request.

        Args:
            scheduler: The bundle's ``scheduler_config.json``.
            sigmas: Noise levels to visit if the request names neither noise levels nor timesteps.
            mu: Dynamic shift of a flow schedule.
            skipped_steps: Steps to leave out at the start.
            strength: Share of the trained timesteps among which a distilled model's sampler chooses.

        Raises:
            InvalidRequestError: if the sampler cannot do what is asked.
        """
        levels = sigmas if self.timesteps is None and self.sigmas is None else self.sigmas
        steps = self.steps if self.timesteps is None and levels is None else None
        return compile_plan(
            self.sampler,
            scheduler,
            steps,
            timesteps=self.timesteps,
            sigmas=levels,
            eta=self.eta,
            mu=mu,
            denoising_start=self.denoising_start,
            denoising_end=self.denoising_end,
            skipped_steps=skipped_steps,
            strength=strength,
        )

    @property
    def guided(self) -> bool:
        """Whether the unconditional half is computed at all."""
        return self.classifier_free and self.guidance > 1

    def guided_at(self, index: int, total: int) -> bool:
        """Whether the unconditional half is computed in call ``index`` of ``total`` of the denoiser."""
        return self.guided and self.guidance_start * total <= index < self.guidance_end * total
