"""Images as CLIP's vision tower takes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.engines import Engine
from latentrt.engines.errors import BundleError

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of CLIP's images by channel, from 0 to 1 (Radford et al. 2021, arXiv 2103.00020; its code's preprocessing)."""
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of CLIP's images by channel, from the same place."""


def clip_pixels(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """Make an image as CLIP takes it, as transformers' ``CLIPImageProcessor`` does.

    The shorter side is resized to ``side`` (bicubic), the middle is cut out, and the channels are normalised with
    CLIP's mean and deviation.

    Args:
        pixels: uint8 ``[h, w, 3]``.
        side: Width and height of the result in pixels.

    Returns:
        float32 ``[1, 3, side, side]``.
    """
    image = Image.fromarray(pixels)
    short, long = sorted(image.size)
    scaled = int(side * long / short)
    image = image.resize((side, scaled) if image.width <= image.height else (scaled, side), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    values = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / np.float32(255)
    mean, deviation = np.array(MEAN, np.float32), np.array(DEVIATION, np.float32)
    return np.ascontiguousarray(((values - mean) / deviation).transpose(2, 0, 1)[None])


def clip_side(engine: Engine, component: str) -> int:
    """Width and height in pixels of the images that an engine's vision tower takes.

    Args:
        engine: The engine.
        component: Its name, for messages.

    Raises:
        BundleError: if it takes no images of a fixed size.
    """
    side = engine.inputs["pixel_values"].shape[-1] if "pixel_values" in engine.inputs else None
    if not isinstance(side, int):
        raise BundleError(f"{component} takes no images of a fixed size; build the bundle again")
    return side
