"""ControlNets of a request: which ones steer, by which images, how much, and in which part of the run."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..bundle.manifest import CONTROL_NAME, CONTROLNET, Manifest, controlled
from ..images.reading import Picture, PictureRecord

_NETS = re.compile(rf"{CONTROLNET}({CONTROL_NAME})", re.ASCII)


@dataclass(frozen=True)
class Control:
    """A ControlNet that steers a request.

    Attributes:
        image: Image to steer by, such as edges or depths, resized to the request's size. A checked request keeps the
            record of it.
        name: Which ControlNet of the bundle; ``None`` is its only one.
        scale: How much it steers, 0 to 10.
        start: Fraction of the run at which it begins to steer.
        end: Fraction of the run at which it ceases to steer.
    """

    image: Picture | PictureRecord
    name: str | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def described(self) -> str:
        """For people and for the text of a PNG, in the order of the web UI's extension."""
        image = self.image.path or self.image.sha256 if isinstance(self.image, PictureRecord) else "an image"
        parts = {"Model": self.name, "Weight": self.scale, "Guidance Start": self.start, "Guidance End": self.end}
        return ", ".join(f"{label}: {value}" for label, value in {**parts, "Image": image}.items())


def controlnets_of(manifest: Manifest) -> tuple[str, ...]:
    """Names of a bundle's ControlNets, in the order of its components."""
    return tuple(match[1] for name in manifest.components if (match := _NETS.fullmatch(name)))


def control_image(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float32]:
    """An image as a ControlNet takes it: resized by Lanczos' filter, as in diffusers.

    Args:
        pixels: uint8 ``[h, w, 3]``; an image of the right size is not resized.
        width: The request's, in pixels.
        height: The request's, in pixels.

    Returns:
        float32 ``[1, 3, height, width]`` from 0 to 1.
    """
    image = Image.fromarray(pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1)[None] / np.float32(255))


def twin_of(denoiser: str, *, fused: bool) -> str:
    """The denoiser's twin that takes a ControlNet's residuals: whole, or its step where the loop is fused."""
    return f"{controlled(denoiser)}_step" if fused else controlled(denoiser)
