"""Masks: the region to paint, and putting the result back into the image."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.engines.errors import InvalidRequestError

from .reading import ReadPicture

Region = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True)
class Pictures:
    """What a caller gives, as it was read."""

    image: ReadPicture
    mask: ReadPicture | None = None


@dataclass(frozen=True)
class Paste:
    """Where and how what was drawn goes into the picture that was given.

    Attributes:
        original: uint8 ``[h, w, 3]``.
        mask: uint8 ``[h, w]``: where it is 0, the original stays bit for bit.
        region: What was drawn of it; ``None`` is all.
    """

    original: NDArray[np.uint8] = field(repr=False)
    mask: NDArray[np.uint8] = field(repr=False)
    region: Region | None = None

    def onto(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pictures ``[k, height, width, 3]``, each put into the original: ``[k, h, w, 3]``."""
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
    """The pictures of a request at the size that is drawn.

    Attributes:
        image: uint8 ``[height, width, 3]``.
        mask: bool ``[height, width]``, where it is painted; ``None`` is everywhere.
        paste: What happens to pictures in the end.
    """

    image: NDArray[np.uint8] = field(repr=False)
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    paste: Paste | None = None


def region_of(mask: NDArray[np.uint8], width: int, height: int, padding: int) -> Region:
    """The part of a picture to draw where only what is around the mask is wanted.

    Args:
        mask: uint8 ``[h, w]``.
        width: Of what is drawn, whose shape the region gets, as far as the picture reaches.
        height: Likewise.
        padding: Pixels around what is painted, at least.

    Returns:
        What the mask covers with the padding, made wider or higher on both sides alike, and moved inwards at an edge.

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
    """A span made as long as asked for, or as ``most`` allows."""
    if length >= most:
        return 0, most
    first -= max(length - (last - first), 0) // 2
    first = min(max(first, 0), most - length)
    return first, first + length
