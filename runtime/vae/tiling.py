"""The autoencoder over large pictures: one overlapping tile after the other, faded linearly into each other.

An autoencoder normalises over all that it sees, and attends to all of it in its middle. So a tile comes out a little
different from the same place of the whole picture, and where tiles meet the difference changes: the fading hides that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from latentrt.engines.errors import EngineError, InvalidRequestError

from ..engine_calls import Floats

Half = Callable[[Floats], Floats]
"""Half of an autoencoder: ``[batch, channels, h, w]`` to the same place in pixels or in latents."""

EDGES = ("shift", "cut")
"""What becomes of a last tile that would reach over the edge, see :class:`Tiling`."""

LEAST_TILE = 8
"""Least side of a tile in latents; in less, an autoencoder sees nothing but the tile's own edges."""


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut into tiles. Lengths are pixels, and multiples of the latent factor.

    Attributes:
        size: Side of a tile. A picture that is no larger in either direction is not cut at all.
        overlap: What neighbours have in common, where one fades into the other, at most half of ``size``; ``None`` is a
            quarter of it.
        edges: ``"shift"`` moves the last tile inwards until it ends with the picture. All tiles then have one shape,
            which is what an engine that was compiled for one needs. ``"cut"`` makes the last one smaller, down to a
            sliver of the overlap's width, as diffusers does (``AutoencoderKL.enable_tiling``).
    """

    size: int = 512
    overlap: int | None = None
    edges: str = "shift"

    def fitted(self, factor: int) -> Tiling:
        """The same, checked, and with an overlap that was left open filled in.

        Args:
            factor: Pixels of a latent along one side.

        Raises:
            InvalidRequestError: naming the first value that does not fit.
        """
        if self.edges not in EDGES:
            raise InvalidRequestError(f"edges of tiles are {self.edges!r}, expected one of {', '.join(EDGES)}")
        size = _length("size", self.size, factor, LEAST_TILE * factor, None)
        quarter = size // 4 // factor * factor
        overlap = quarter if self.overlap is None else _length("overlap", self.overlap, factor, 0, size // 2)
        return replace(self, size=size, overlap=overlap)

    def splits(self, width: int, height: int) -> bool:
        """Whether a picture of so many pixels is cut at all."""
        return max(width, height) > self.size


def _length(name: str, value: object, factor: int, least: int, most: int | None) -> int:
    expected = f"a multiple of {factor} from {least}" + ("" if most is None else f" to {most}, half of their size")
    if not isinstance(value, int) or isinstance(value, bool) or value % factor or value < least:
        raise InvalidRequestError(f"the {name} of tiles is {value!r} pixels, expected {expected}")
    if most is not None and value > most:
        raise InvalidRequestError(f"the {name} of tiles is {value} pixels, expected {expected}")
    return value


def decode_tiles(decode: Half, latents: Floats, tiling: Tiling, factor: int) -> Iterator[Floats]:
    """Decode from top to bottom; no more than a row of tiles is in memory at a time.

    Args:
        decode: The decoder: latents ``[batch, channels, h, w]`` to ``[batch, 3, h * factor, w * factor]``.
        latents: All latents.
        tiling: How to cut, see :meth:`Tiling.fitted`.
        factor: Pixels of a latent along one side.

    Yields:
        Finished lines of the picture, float32 ``[batch, 3, lines, w * factor]``.

    Raises:
        InvalidRequestError: if the tiling does not fit the factor.
        EngineError: if the decoder gives another size than that.
    """
    return _tiles(decode, latents, tiling.fitted(factor), factor, (1, factor))


def encode_tiles(encode: Half, pixels: Floats, tiling: Tiling, factor: int) -> Floats:
    """Encode tile by tile.

    Args:
        encode: The encoder: pixels ``[batch, 3, h, w]`` to ``[batch, channels, h / factor, w / factor]``.
        pixels: All pixels; sides are multiples of ``factor``.
        tiling: How to cut, see :meth:`Tiling.fitted`.
        factor: Pixels of a latent along one side.

    Returns:
        What the encoder gives, of the whole picture.

    Raises:
        InvalidRequestError: if picture or tiling do not fit the factor.
        EngineError: if the encoder gives another size than that.
    """
    height, width = pixels.shape[2:]
    if height % factor or width % factor:
        raise InvalidRequestError(f"the picture is {width}x{height}, expected multiples of {factor}")
    return np.concatenate(list(_tiles(encode, pixels, tiling.fitted(factor), factor, (factor, 1))), axis=2)


def _tiles(half: Half, values: Floats, tiling: Tiling, factor: int, scales: tuple[int, int]) -> Iterator[Floats]:
    """Finished lines, from top to bottom.

    Args:
        half: Decoder or encoder.
        values: What it takes.
        tiling: How to cut.
        factor: Pixels of a latent.
        scales: How much longer than a latent an element is that goes in, and one that comes out.
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
            # First over the tile above and then over the one before, each as it has become: diffusers' order, which
            # decides the weights where four tiles meet.
            found = _faded(above[column], found, axis=2)
            found = _faded(before, found, axis=3)
            above[column] = found[:, :, finished:].copy()  # no view, which would keep the tile
            before = found[..., (right - left) * given :]
            parts.append(found[:, :, :finished, : (right - left) * given])
        yield np.concatenate(parts, axis=3)


def _starts(length: int, size: int, overlap: int, edges: str) -> list[int]:
    """Where tiles begin along one side, in latents."""
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
