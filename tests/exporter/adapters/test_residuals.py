"""Residuals of a ControlNet are as many, and as wide, as diffusers has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel

from latentrt.engines.errors import SourceError
from latentrt.exporter.adapters.residuals import level_of, residual_shapes


def test_residuals_follow_the_levels() -> None:
    """As many and as wide as diffusers has them, and ranges of compiled engines halve from level to level."""
    shapes = residual_shapes({"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2})
    assert len(shapes) == 13
    assert shapes[0] == (320, "latent_height", "latent_width")
    assert shapes[3] == (320, "latent_height_1", "latent_width_1")
    assert shapes[-1] == (1280, "latent_height_3", "latent_width_3")


def test_residuals_are_those_of_diffusers(tiny: Any) -> None:
    """A ControlNet gives one for each shape, in this order, of its width, halved as often as the level says."""
    model = ControlNetModel.from_pretrained(tiny.controlnet("sd1")).eval()
    factor = 2 ** (len(model.config["conditioning_embedding_out_channels"]) - 1)
    image = torch.zeros(1, 3, 8 * factor, 12 * factor)
    with torch.no_grad():
        down, middle = model(torch.zeros(1, 4, 8, 12), 1, torch.zeros(1, 7, 32), image, return_dict=False)
    shapes = residual_shapes(model.config)
    expected = [(width, 8 >> level_of(height), 12 >> level_of(axis)) for width, height, axis in shapes]
    assert [tuple(residual.shape[1:]) for residual in (*down, middle)] == expected


@pytest.mark.parametrize("layers", [0, "two", [2, 2, 2], [2, 0], None])
def test_layers_that_no_level_has(layers: Any) -> None:
    """Numbers of layers are whole, above zero, and one for each level."""
    with pytest.raises(SourceError, match=r"'layers_per_block' is .*, expected a whole number, or one for each level"):
        residual_shapes({"block_out_channels": [32, 64], "layers_per_block": layers})
