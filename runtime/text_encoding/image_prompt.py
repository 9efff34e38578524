"""Encoding an image prompt for the denoiser of a bundle with an IP-Adapter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine

from ..bundle.manifest import IMAGE_ENCODER
from ..engine_calls import Conditioning, outputs_of
from ..families import Family
from ..images.clip_vision import clip_pixels, clip_side

TOKENS, SCALE = "image_tokens", "image_scale"
"""What the denoiser is told of a picture: tokens ``[rows, 4, width]``, and how much of it ``[rows]``."""


def encode_picture(engine: Engine, pixels: NDArray[np.uint8], scale: float) -> tuple[Conditioning, Conditioning]:
    """What the denoiser is told of a picture: in the unconditional half, where that is no picture, and in the other.

    Raises:
        EngineError: if the engine fails.
        BundleError: if it is no image encoder.
    """
    feeds = {"pixel_values": clip_pixels(pixels, clip_side(engine, IMAGE_ENCODER))}
    found = outputs_of(engine, IMAGE_ENCODER, (TOKENS, f"no_{TOKENS}"), feeds)
    much = np.full(1, scale, np.float32)
    return {TOKENS: found[f"no_{TOKENS}"], SCALE: much}, {TOKENS: found[TOKENS], SCALE: much}


def no_picture(family: Family) -> Conditioning:
    """What a denoiser that could be told a picture is told where there is none: then it is as without an adapter."""
    if IMAGE_ENCODER not in family.manifest.components:
        return {}
    return {TOKENS: family.zeros(TOKENS), SCALE: np.zeros(1, np.float32)}
