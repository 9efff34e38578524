"""Pictures as CLIP's vision tower takes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.engines import Engine
from latentrt.engines.errors import BundleError

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of CLIP's pictures by channel, from 0 to 1 (Radford et al. 2021, arXiv 2103.00020; its code's preprocessing)."""
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Their standard deviation, likewise."""


def clip_pixels(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """A picture ``[h, w, 3]`` as CLIP takes it: float32 ``[1, 3, side, side]``.

    The shorter side is resized to ``side`` (bicubic), the middle cut out, and channels brought to CLIP's mean and
    deviation, as transformers' ``CLIPImageProcessor`` does.
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
    """Pixels a side of the pictures that an engine's vision tower takes.

    Raises:
        BundleError: if it takes no pictures of a fixed size.
    """
    side = engine.inputs["pixel_values"].shape[-1] if "pixel_values" in engine.inputs else None
    if not isinstance(side, int):
        raise BundleError(f"{component} takes no pictures of a fixed size; build the bundle again")
    return side
