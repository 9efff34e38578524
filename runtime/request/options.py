"""The options of a request: names, types, bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from ..images.reading import Picture, PictureRecord
from ..vae.tiling import Tiling
from .control import Control

MAX_SIDE = 16384
"""Largest width or height in pixels."""


MAX_PIXELS = 2**28
"""Most pixels that the pictures of one request may have together (3 GiB as fp32)."""


OUTPUTS = ("image", "latent")
"""What a request may be answered with."""


SAFETY = ("off", "mark", "black")
"""What may become of unsafe pictures: they are not looked for, or flagged, or flagged and made black."""


LONGEST_SEQUENCE = 512
"""Most tokens of a T5 text encoder, as in diffusers."""


class FamilyOptions(TypedDict, total=False):
    """Keywords of a request for models of some families alone: fields of :class:`Request`; ``None`` is not given."""

    prompt_2: str | None
    negative_prompt_2: str | None
    original_size: tuple[int, int] | None
    crop: tuple[int, int] | None
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crop: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None
    prompt_3: str | None
    negative_prompt_3: str | None
    max_sequence_length: int | None
    prompt_syntax: str | None


class TaskOptions(TypedDict, total=False):
    """Keywords of a request that draws from a picture, or varies one; see :mod:`.tasks`.

    ``image`` and ``mask`` are pictures where a pipeline is called, and records of them in :class:`Request`.
    """

    image: Picture | PictureRecord | None
    mask: Picture | PictureRecord | None
    strength: float | None
    resize: str | None
    mask_blur: float | None
    mask_padding: int | None
    keep_outside: bool | None
    variation_seed: int | None
    variation_strength: float | None


class SpecialOptions(FamilyOptions, TaskOptions, total=False):
    """Keywords that only some families or tasks have."""


class RequestOptions(SpecialOptions, total=False):
    """Keywords of a request besides the prompt: fields of :class:`Request`; ``None`` is the bundle's default."""

    negative_prompt: str
    steps: int | None
    guidance: float | None
    seed: int | None
    sampler: str | None
    width: int | None
    height: int | None
    images: int
    clip_skip: int | None
    guidance_start: float
    guidance_end: float
    guidance_rescale: float
    eta: float | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    denoising_start: float | None
    denoising_end: float | None
    output: str | None
    decoder: str | None
    vae_tiling: Tiling | int | bool | None
    control: Sequence[Control] | None
    guess_mode: bool
    ip_adapter_image: PictureRecord | None
    ip_adapter_scale: float | None
    safety: str | None


RESIZES = ("stretch", "crop")
"""What becomes of a picture of another shape: it is stretched, or its middle is cut out."""
