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
    """A text-to-image request with every default filled in.

    Attributes:
        prompt: What to draw; what exceeds the tokenizer's length is cut off.
        negative_prompt: What to steer away from.
        steps: Sampler steps. (A sampler of second order calls the model twice in a step.)
        guidance: Scale of classifier-free guidance; at 1 or below the negative prompt is not computed at all.
        seed: Seed of the noise, 0 to 2**64 - 1: the same as ``torch.Generator("cpu").manual_seed(seed)``.
        sampler: One of :data:`latentrt.runtime.samplers.SAMPLERS`.
        width: Width in pixels.
        height: Height in pixels.
        images: Pictures to draw, all from one noise stream.
        clip_skip: Layers of the text encoder to leave out: 0 or 1.
        guidance_start: Fraction of the run from which on there is guidance; before it the negative prompt is not
            computed (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        guidance_end: Fraction of the run from which on there is none any more.
        guidance_rescale: Share, 0 to 1, of a prediction whose contrast is brought back to that of the conditional one
            (Lin et al. 2023, arXiv 2305.08891, section 3.4).
        eta: Amount of fresh noise, 0 to 1, for the samplers that have the choice; ``None`` is the sampler's own.
        timesteps: Timesteps to visit, descending, in place of those that the sampler would choose.
        sigmas: Noise levels to visit, descending, in the form that the sampler's diffusers class takes.
        prompt_2: Prompt of the second text encoder; ``None`` or nothing is ``prompt``.
        negative_prompt_2: Likewise what to steer away from.
        original_size: Width and height in pixels of the picture that the model is to think this one was made from; a
            small one gives a blurry picture. ``None`` is the picture's own, as for the next two.
        crop: Left and top of the cut-out that it is to think the picture is; ``None`` is the corner.
        target_size: Width and height that it is to think the picture has.
        negative_original_size: What it is to be steered away from, likewise; ``None`` is as for the prompt.
        negative_crop: Likewise; ``None`` is the corner.
        negative_target_size: Likewise.
        aesthetic_score: Score, 0 to 10, that the model is to think the picture has; ``None`` is 6.
        negative_aesthetic_score: What it is to be steered away from, likewise; ``None`` is 2.5.
        denoising_start: Fraction of the trained timesteps, counted from pure noise, at which the request goes on from
            latents that are given; ``None`` is the start.
        denoising_end: Fraction at which it ends, with noise left for another model to take away; ``None`` is the end.
        output: One of :data:`OUTPUTS`: pictures, or latents alone.
        decoder: One of :data:`DECODERS`: the model's own, or a tiny one, where the bundle has one.
        prompt_3: Prompt of the third text encoder; ``None`` or nothing is ``prompt``.
        negative_prompt_3: Likewise what to steer away from.
        max_sequence_length: Tokens of a T5 text encoder, padding included; ``None`` is the family's number.
        prompt_syntax: How prompts are read, one of :data:`latentrt.runtime.text.chunks.SYNTAXES`.
        vae_tiling: How pictures are cut into tiles to be decoded; ``None`` decodes them whole.
        image: The picture that it begins with.
        mask: The picture that says what of it is painted anew: where it is white.
        strength: How much of the picture is changed, above 0 and up to 1: the share of the steps that are taken.
        resize: One of :data:`latentrt.runtime.request.options.RESIZES`.
        mask_blur: Radius in pixels by which the mask is blurred.
        mask_padding: Pixels around the mask: that part of the picture alone is drawn, at the size of the request, and
            put back into its place. ``None`` draws all of it.
        keep_outside: Whether the result is put into the picture through the mask, so that what is outside of it is the
            picture's, bit for bit.
        variation_seed: Seed of the noise that the seed's own is turned towards.
        variation_strength: How far, 0 to 1.
        control: ControlNets that steer, with records of their pictures.
        guess_mode: Whether they act on the prompt's half of guidance alone, and less on finer levels (Zhang et al.
            2023, arXiv 2302.05543, section 3.4 as of its first version).
        ip_adapter_image: What is kept of a picture that is part of the prompt.
        ip_adapter_scale: How much of it, 0 to 10; 1 unless given.
        safety: What becomes of unsafe pictures: ``"off"`` does not look for them, ``"mark"`` flags them, ``"black"``
            flags them and makes them black.
        classifier_free: Whether guidance comes from a second prediction, for the negative prompt. If not, the model
            takes its scale in, or knows none.
        embeddings: Words of the pipeline with vectors from files.
        loras: LoRAs that were on while it was drawn, in their order; a pipeline fills this in.
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
        """The sampler's plan for this request.

        Args:
            scheduler: The bundle's ``scheduler_config.json``.
            sigmas: Noise levels to visit if the request names neither levels nor timesteps.
            mu: Dynamic shift of a flow schedule.
            skipped_steps: Steps to leave out at the start.
            strength: Share of the timesteps among which a distilled model's sampler chooses.

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
