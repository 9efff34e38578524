"""Masks: the region to draw, against diffusers, and the way back into the image, against Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.images.masks import Paste, Region, region_of


def test_regions_are_those_of_diffusers() -> None:
    """Wherever a mask lies, the region around it is the one that diffusers' pipelines draw."""
    random = np.random.default_rng(5)
    for _ in range(300):
        height, width = random.integers(8, 90, 2)
        mask = np.zeros((height, width), np.uint8)
        top, left = random.integers(0, height), random.integers(0, width)
        mask[top : top + random.integers(1, 40), left : left + random.integers(1, 40)] = 255
        drawn, padding = random.integers(1, 9, 2) * 8, int(random.integers(0, 20))
        expected = VaeImageProcessor.get_crop_region(Image.fromarray(mask), *map(int, drawn), pad=padding)
        found = region_of(mask, *map(int, drawn), padding)
        assert np.abs(np.subtract(found, expected)).max() <= 1, (mask.shape, drawn, padding)


def test_a_black_mask_is_refused() -> None:
    """Nothing would be painted."""
    with pytest.raises(InvalidRequestError, match="mask has no white in it"):
        region_of(np.zeros((8, 8), np.uint8), 8, 8, 0)


@pytest.mark.parametrize("region", [None, (5, 2, 21, 10)])
def test_images_go_back_as_pillow_pastes_them(region: Region | None) -> None:
    """Where the mask is black the original stays bit for bit; elsewhere the drawn image is blended in its region."""
    random = np.random.default_rng(0)
    original = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    drawn = random.integers(0, 256, (2, 20, 30, 3) if region is None else (2, 16, 32, 3), dtype=np.uint8)
    mask = random.integers(0, 256, (20, 30), dtype=np.uint8)
    mask[:, :7] = 0
    found = Paste(original, mask, region).onto(drawn)
    assert found.shape == (2, 20, 30, 3)
    np.testing.assert_array_equal(found[:, :, :7], np.stack([original[:, :7]] * 2))
    for each, image in zip(found, drawn, strict=True):
        whole = original.copy()
        if region is None:
            whole = image
        else:
            left, top, right, bottom = region
            small = Image.fromarray(image).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
            whole[top:bottom, left:right] = np.asarray(small)
        weight = mask[..., None] / 255
        assert np.abs(each - (whole * weight + original * (1 - weight))).max() <= 1


def test_no_images_stay_none() -> None:
    """A request that ends in latents has nothing to paste."""
    blank = np.zeros((4, 4, 3), np.uint8)
    assert Paste(blank, blank[..., 0]).onto(np.empty((0, 4, 4, 3), np.uint8)).shape == (0, 4, 4, 3)
