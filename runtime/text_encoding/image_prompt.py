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
"""The denoiser's inputs of an image prompt: its tokens ``[rows, 4, width]``, and its scale ``[rows]``."""


def encode_image_prompt(engine: Engine, pixels: NDArray[np.uint8], scale: float) -> tuple[Conditioning, Conditioning]:
    """The denoiser's inputs of an image prompt.

    Args:
        engine: The opened engine of the image encoder.
        pixels: The image, uint8 ``[h, w, 3]``.
        scale: The factor on its attention.

    Returns:
        The inputs of the unconditional half, whose tokens stand for no image, and those of the conditional one.

    Raises:
        EngineError: if the engine fails.
        BundleError: if it is no image encoder.
    """
    feeds = {"pixel_values": clip_pixels(pixels, clip_side(engine, IMAGE_ENCODER))}
    found = outputs_of(engine, IMAGE_ENCODER, (TOKENS, f"no_{TOKENS}"), feeds)
    row = np.full(1, scale, np.float32)
    return {TOKENS: found[f"no_{TOKENS}"], SCALE: row}, {TOKENS: found[TOKENS], SCALE: row}


def no_image_prompt(family: Family) -> Conditioning:
    """The denoiser's inputs where a bundle has an IP-Adapter and a request no image: it predicts as without an adapter.

    Nothing for a bundle without one.
    """
    if IMAGE_ENCODER not in family.manifest.components:
        return {}
    return {TOKENS: family.zeros(TOKENS), SCALE: np.zeros(1, np.float32)}
