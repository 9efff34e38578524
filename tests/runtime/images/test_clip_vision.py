"""Images as CLIP's vision tower takes them, against transformers' image processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from latentrt.runtime.images.clip_vision import clip_pixels


@pytest.mark.parametrize("size", [(71, 50), (31, 60), (33, 33), (32, 200), (5, 4)])
def test_clip_sees_what_transformers_prepares(size: tuple[int, int]) -> None:
    """Wide, high, small and square pictures agree to rounding."""
    picture = np.random.default_rng(5).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    expected = CLIPImageProcessor(size=32, crop_size=32)(Image.fromarray(picture), return_tensors="np").pixel_values
    np.testing.assert_allclose(clip_pixels(picture, 32), expected, atol=1e-5)
