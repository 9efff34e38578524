"""What a request says of ControlNets: which, with which picture, how much, and in which part of the run."""

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
    """A ControlNet of a request.

    Attributes:
        image: What steers, such as edges or depths: a picture, resized to that of the request; in a request that was
            checked, what is kept of it.
        name: Which ControlNet of the bundle; ``None`` is its only one.
        scale: How much, 0 to 10.
        start: Fraction of the run from which on it steers.
        end: Fraction of the run up to which it steers.
    """

    image: Picture | PictureRecord
    name: str | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def told(self) -> str:
        """For people and for the text of a picture, in the order in which the web UI's extension has it."""
        picture = self.image.path or self.image.sha256 if isinstance(self.image, PictureRecord) else "a picture"
        parts = {"Model": self.name, "Weight": self.scale, "Guidance Start": self.start, "Guidance End": self.end}
        return ", ".join(f"{label}: {value}" for label, value in {**parts, "Image": picture}.items())


def controlnets_of(manifest: Manifest) -> tuple[str, ...]:
    """Names of a bundle's ControlNets."""
    return tuple(match[1] for name in manifest.components if (match := _NETS.fullmatch(name)))


def control_image(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float32]:
    """A picture as a ControlNet takes it: float32 ``[1, 3, height, width]`` from 0 to 1, resized by Lanczos' filter.

    So does diffusers; a picture of the right size stays as it is.
    """
    image = Image.fromarray(pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1)[None] / np.float32(255))


def twin_of(denoiser: str, *, fused: bool) -> str:
    """The component that takes residuals in, for one way to run the loop."""
    return f"{controlled(denoiser)}_step" if fused else controlled(denoiser)
