"""A ControlNet's image in a request, resized as Pillow does it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from latentrt.runtime.request.control import control_image

PICTURE = np.random.default_rng(3).integers(0, 256, (24, 48, 3), dtype=np.uint8)


def test_a_control_image_is_resized_as_pillow_does() -> None:
    """Values go from 0 to 1; a picture of the right size is not touched."""
    image = control_image(PICTURE, 48, 24)
    assert (image.dtype, image.shape) == (np.float32, (1, 3, 24, 48))
    np.testing.assert_array_equal(np.rint(image[0] * 255), PICTURE.transpose(2, 0, 1))
    small = np.asarray(Image.fromarray(PICTURE).resize((16, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(np.rint(control_image(PICTURE, 16, 8)[0] * 255), small.transpose(2, 0, 1))
