"""The residuals that a ControlNet gives to its U-Net: how many there are, how wide, and on which level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.engines.checks import is_integer
from latentrt.engines.errors import SourceError

Shape = tuple[int, str, str]
"""Channels of a residual, and the names of its height and width."""


def residual_shapes(config: Mapping[str, Any]) -> tuple[Shape, ...]:
    """The residuals of a U-Net in the order in which diffusers has them: one a skip connection, then the middle's.

    Args:
        config: ``config.json`` of the U-Net or of a ControlNet for it; its levels must have been checked.

    Raises:
        SourceError: if it does not say how many layers a level has.
    """
    widths = config.get("block_out_channels", [320, 640, 1280, 1280])
    layers = config.get("layers_per_block", 2)
    counts = layers if isinstance(layers, list) else [layers] * len(widths)
    if len(counts) != len(widths) or not all(is_integer(count) and count >= 1 for count in counts):
        raise SourceError(f"'layers_per_block' is {layers!r}, expected a whole number, or one for each level")
    found = [_shape(widths[0], 0)]
    for level, (width, count) in enumerate(zip(widths, counts, strict=True)):
        found += [_shape(width, level)] * count
        if level + 1 < len(widths):  # the convolution that halves the size has a skip connection too
            found.append(_shape(width, level + 1))
    return (*found, _shape(widths[-1], len(widths) - 1))


def level_of(name: str) -> int:
    """How often the latents' height or width of this name was halved."""
    return int(name.removeprefix("latent_").partition("_")[2] or 0)


def _shape(width: int, level: int) -> Shape:
    suffix = f"_{level}" if level else ""
    return width, f"latent_height{suffix}", f"latent_width{suffix}"
