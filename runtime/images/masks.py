"""Masks: the region to paint, and pasting the result into the original."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.engines.errors import InvalidRequestError

from .reading import ReadPicture

Region = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are excluded."""


@dataclass(frozen=True)
class Pictures:
    """The starting image of a request, and its mask, as they were read."""

    image: ReadPicture
    mask: ReadPicture | None = None


@dataclass(frozen=True)
class Paste:
    """How drawn images are pasted into the starting image.

    Attributes:
        original: The starting image, uint8 ``[h, w, 3]``.
        mask: Weight of the drawn image, uint8 ``[h, w]``; where it is 0, the original stays bit for bit.
        region: The part of the original that was drawn; ``None`` is all of it.
    """

    original: NDArray[np.uint8] = field(repr=False)
    mask: NDArray[np.uint8] = field(repr=False)
    region: Region | None = None

    def onto(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Put each of some images, uint8 ``[k, height, width, 3]``, into the original: uint8 ``[k, h, w, 3]``."""
        original, mask = Image.fromarray(self.original), Image.fromarray(self.mask)
        pasted = []
        for drawn in map(Image.fromarray, images):
            if self.region is not None:
                left, top, right, bottom = self.region
                whole = original.copy()
                whole.paste(drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
                drawn = whole
            pasted.append(np.asarray(Image.composite(drawn, original, mask)))
        return np.stack(pasted) if pasted else images


@dataclass(frozen=True)
class InputImages:
    """The starting image of a request and its mask, at the size that is drawn.

    Attributes:
        image: uint8 ``[height, width, 3]``.
        mask: bool ``[height, width]``, true where the image is painted; ``None`` is everywhere.
        paste: How drawn images go back into the original; ``None`` leaves them alone.
    """

    image: NDArray[np.uint8] = field(repr=False)
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    paste: Paste | None = None


def region_of(mask: NDArray[np.uint8], width: int, height: int, padding: int) -> Region:
    """The part of an image to draw where only the surroundings of the mask are wanted.

    The region covers the mask with the padding. It is widened equally on both sides to the shape that is drawn, and
    moved inwards at an edge, as diffusers' ``VaeImageProcessor.get_crop_region`` does.

    Args:
        mask: uint8 ``[h, w]``; all that is not 0 is painted.
        width: Width in pixels that is drawn.
        height: Height in pixels that is drawn.
        padding: Least number of pixels around the painted part.

    Raises:
        InvalidRequestError: if the mask is black.
    """
    if not mask.any():
        raise InvalidRequestError("mask has no white in it, and white is what is painted; give another mask")
    spans = []
    for axis, length in ((0, mask.shape[1]), (1, mask.shape[0])):
        covered = np.flatnonzero(mask.any(axis=axis))
        spans.append([max(int(covered[0]) - padding, 0), min(int(covered[-1]) + 1 + padding, length)])
    (left, right), (top, bottom) = spans
    wide = (right - left) * height > (bottom - top) * width
    if wide:
        top, bottom = _widened(top, bottom, int((right - left) * height / width), mask.shape[0])
    else:
        left, right = _widened(left, right, int((bottom - top) * width / height), mask.shape[1])
    return left, top, right, bottom


def _widened(first: int, last: int, length: int, most: int) -> tuple[int, int]:
    """A span widened to a length, within 0 and ``most``."""
    if length >= most:
        return 0, most
    first -= max(length - (last - first), 0) // 2
    first = min(max(first, 0), most - length)
    return first, first + length
