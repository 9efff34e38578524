"""The autoencoder over large images: one overlapping tile after the other, faded linearly into each other.

An autoencoder normalises over all of its input, and attends to all of it in its middle. So a tile differs a little from
the same place of the whole image, and the difference changes where tiles meet: the fading hides that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from latentrt.engines.checks import check_choice, is_integer, show
from latentrt.engines.errors import EngineError, InvalidRequestError

from ..engine_calls import Floats

Half = Callable[[Floats], Floats]
"""Half of an autoencoder: latents ``[batch, channels, h, w]`` to pixels, or pixels to latents."""

EDGES = ("shift", "cut")
"""Ways to treat a last tile that would reach over the edge, see :class:`Tiling`."""

LEAST_TILE = 8
"""Least side of a tile in latents; smaller tiles would consist of nothing but edges."""


@dataclass(frozen=True)
class Tiling:
    """How an image is cut into tiles. Lengths are pixels, and multiples of the latent factor.

    Attributes:
        size: Side of a tile. An image that is no larger in either direction is not cut at all.
        overlap: Width of the part that neighbours share, where one fades into the other, at most half of ``size``;
            ``None`` is a quarter of it.
        edges: ``"shift"`` moves the last tile inwards until it ends with the image. All tiles then have one shape, as
            an engine that was compiled for one needs. ``"cut"`` makes the last one smaller, down to a
            sliver of the overlap's width, as diffusers does (``AutoencoderKL.enable_tiling``).
    """

    size: int = 512
    overlap: int | None = None
    edges: str = "shift"

    def fitted(self, factor: int) -> Tiling:
        """The same tiling, checked, with the default overlap filled in.

        Args:
            factor: Pixels of a latent along one side.

        Raises:
            InvalidRequestError: naming the first value that does not fit.
        """
        check_choice("vae_tiling.edges", self.edges, EDGES)
        size = _length("size", self.size, factor, LEAST_TILE * factor, None)
        quarter = size // 4 // factor * factor
        overlap = quarter if self.overlap is None else _length("overlap", self.overlap, factor, 0, size // 2)
        return replace(self, size=size, overlap=overlap)

    def splits(self, width: int, height: int) -> bool:
        """Whether an image of this size in pixels is cut at all."""
        return max(width, height) > self.size


def _length(name: str, value: object, factor: int, least: int, most: int | None) -> int:
    """A length of tiles in pixels, as a Python ``int``."""
    if not is_integer(value) or value % factor or value < least or (most is not None and value > most):
        expected = f"a multiple of {factor} from {least}" + ("" if most is None else f" to {most}, half of their size")
        raise InvalidRequestError(f"the {name} of tiles is {show(value)} pixels, expected {expected}")
    return int(value)


def decode_tiles(decode: Half, latents: Floats, tiling: Tiling, factor: int) -> Iterator[Floats]:
    """Decode from top to bottom; at most one row of tiles is in memory at a time.

    Args:
        decode: The decoder: latents ``[batch, channels, h, w]`` to ``[batch, 3, h * factor, w * factor]``.
        latents: All latents, float32 ``[batch, channels, h, w]``.
        tiling: How to cut, see :meth:`Tiling.fitted`.
        factor: Pixels of a latent along one side.

    Yields:
        Finished lines of the image, float32 ``[batch, 3, lines, w * factor]``.

    Raises:
        InvalidRequestError: if the tiling does not fit the factor.
        EngineError: if the decoder gives another size than that.
    """
    return _tiles(decode, latents, tiling.fitted(factor), factor, (1, factor))


def encode_tiles(encode: Half, pixels: Floats, tiling: Tiling, factor: int) -> Floats:
    """Encode tile by tile.

    Args:
        encode: The encoder: pixels ``[batch, 3, h, w]`` to ``[batch, channels, h / factor, w / factor]``.
        pixels: All pixels, float32 ``[batch, 3, h, w]``; sides are multiples of ``factor``.
        tiling: How to cut, see :meth:`Tiling.fitted`.
        factor: Pixels of a latent along one side.

    Returns:
        The encoder's output for the whole image, float32 ``[batch, channels, h / factor, w / factor]``.

    Raises:
        InvalidRequestError: if the image or the tiling does not fit the factor.
        EngineError: if the encoder gives another size than that.
    """
    height, width = pixels.shape[2:]
    if height % factor or width % factor:
        raise InvalidRequestError(f"the image is {width}x{height}, expected multiples of {factor}")
    return np.concatenate(list(_tiles(encode, pixels, tiling.fitted(factor), factor, (factor, 1))), axis=2)


def _tiles(half: Half, values: Floats, tiling: Tiling, factor: int, scales: tuple[int, int]) -> Iterator[Floats]:
    """Finished lines, from top to bottom.

    Args:
        half: Decoder or encoder.
        values: Its whole input.
        tiling: How to cut.
        factor: Pixels of a latent along one side.
        scales: Elements of the input, and of the output, along one side of a latent.
    """
    taken, given = scales
    size, overlap = tiling.size // factor, (tiling.overlap or 0) // factor
    height, width = (length // taken for length in values.shape[2:])
    down, across = (_starts(length, size, overlap, tiling.edges) for length in (height, width))
    above: list[Floats | None] = [None] * len(across)  # of each column, what the tile below fades in over
    for top, until in zip(down, [*down[1:], height], strict=True):
        parts: list[Floats] = []
        before: Floats | None = None
        finished = (until - top) * given
        for column, (left, right) in enumerate(zip(across, [*across[1:], width], strict=True)):
            tile = values[:, :, top * taken : (top + size) * taken, left * taken : (left + size) * taken]
            found = half(np.ascontiguousarray(tile))
            expected = tuple(length // taken * given for length in tile.shape[2:])
            if found.shape[2:] != expected:
                raise EngineError(
                    f"a tile came out as {found.shape[3]}x{found.shape[2]}, expected {expected[1]}x{expected[0]}"
                )
            # First over the tile above, then over the one before, each already faded: diffusers' order, which decides
            # the weights where four tiles meet.
            found = _faded(above[column], found, axis=2)
            found = _faded(before, found, axis=3)
            above[column] = found[:, :, finished:].copy()  # no view, which would keep the tile
            before = found[..., (right - left) * given :]
            parts.append(found[:, :, :finished, : (right - left) * given])
        yield np.concatenate(parts, axis=3)


def _starts(length: int, size: int, overlap: int, edges: str) -> list[int]:
    """Beginnings of the tiles along one side, in latents."""
    starts = list(range(0, length, size - overlap))
    if edges == "cut":
        return starts
    inside = [start for start in starts if start + size < length]
    return [*inside, max(length - size, 0)]


def _faded(before: Floats | None, after: Floats, axis: int) -> Floats:
    """``after``, at whose beginning ``before`` ends, fading in along ``axis``."""
    if before is None:
        return after
    length = before.shape[axis]
    share = (np.arange(length, dtype=np.float32) / np.float32(max(length, 1))).reshape(-1, *[1] * (3 - axis))
    first, rest = np.split(after, [length], axis=axis)
    return np.concatenate([before + (first - before) * share, rest], axis=axis)
