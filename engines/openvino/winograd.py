"""Winograd convolution in OpenVINO models: 3x3 convolutions from fewer multiplications than their kernels have taps.

The picture is cut into tiles that overlap. A tile of m x m results meets (m + 2) x (m + 2) pixels. Pixels and kernel
are transformed, multiplied point by point, and what comes of it is transformed back. Over many channels each point is a
product of matrices, (m + 2)^2 of them in place of 9 m^2: 16 for 36 with m = 2, 36 for 144 with m = 4. (Winograd 1980,
"Arithmetic complexity of computations"; Lavin and Gray 2015, "Fast algorithms for convolutional neural networks",
arXiv 1509.09308.)

The transforms round, so larger tiles are for fp32 only. All of it is made of operators that OpenVINO has. What is fast
was measured on x86-64 with AVX-512 and without AMX, see :func:`largest_tile`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph import is_plain_3x3, replace

Matrix = NDArray[np.float64]
_Pair = tuple[int, int]

# By benchmarks/winograd.py; its table is in docs/benchmarks.md. With fewer channels the transforms cost what they save.
CHANNELS = 256
"""Fewest channels, of both sides, that are worth it."""
TILES = 64
"""Fewest tiles of a picture: with fewer, transformed weights are read for too little work, and they take memory."""
WIDE = 1024
"""From so many channels on (of both sides), pictures of unknown size are taken to have fewer tiles than that."""

_CPUINFO = Path("/proc/cpuinfo")
_LARGEST = {"fp32": 4, "bf16": 2}  # in bf16 larger ones lose too much to rounding

# The points at which polynomials are taken, and infinity. {0, 1, -1} is Lavin and Gray's. For tiles of 4 these round to
# half of what their {0, 1, -1, 2, -2} does, since they keep the entries of all three matrices near 1 (the idea is that
# of Barabasz et al. 2020, "Error analysis and improving the accuracy of Winograd convolution", arXiv 1803.10986).
_POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
}


@dataclass(frozen=True)
class Transforms:
    """The matrices of one tile size: ``results @ ((kernel @ g) * (pixels @ d))`` convolves d with g.

    Attributes:
        results: ``[m, m + 2]``.
        kernel: ``[m + 2, 3]``.
        pixels: ``[m + 2, m + 2]``.
    """

    results: Matrix
    kernel: Matrix
    pixels: Matrix

    @property
    def tile(self) -> int:
        """Results of a tile along one dimension."""
        return len(self.results)


@cache
def transforms(tile: int) -> Transforms:
    """Matrices of a tile size, 2 or 4, by the construction of Toom and Cook."""
    points = _POINTS[tile]
    others = [[each for each in points if each != point] for point in points]
    results = [[point**power for point in points] + [Fraction(power == tile - 1)] for power in range(tile)]
    kernel = [
        [point**power / _product(point - other for other in rest) for power in range(3)]
        for point, rest in zip(points, others, strict=True)
    ]
    kernel.append([Fraction(0), Fraction(0), Fraction(1)])
    pixels = [[*_polynomial(rest), Fraction(0)] for rest in others]
    pixels.append(_polynomial(points))
    return Transforms(*(np.array(each, np.float64) for each in (results, kernel, pixels)))


def _product(factors: Any) -> Fraction:
    result = Fraction(1)
    for factor in factors:
        result *= factor
    return result


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the polynomial with these roots, lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        found = [low - root * high for low, high in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


def largest_tile(computed_in: str) -> int:
    """The largest tile to take on this processor, 0 for none.

    Cases:
        1. x86-64: 4 in fp32, 2 in bf16.
        2. bf16 where there is AMX: none, since products are so fast there that moving pixels about may cost more than
           they do. Nobody has measured it yet.
        3. Other processors: none; on ARM OpenVINO's library has kernels of this kind itself.

    Args:
        computed_in: ``"fp32"`` or ``"bf16"``.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return 0
    return 0 if computed_in == "bf16" and _has_amx() else _LARGEST[computed_in]


def _has_amx() -> bool:
    """Whether the processor multiplies matrices of bf16 in tiles of its own; only Linux tells."""
    return _CPUINFO.is_file() and "amx_bf16" in _CPUINFO.read_text(encoding="utf-8", errors="replace").split()


def convolve_by_tiles(
    model: Any, sdk: ModuleType, *, largest: int, channels: int = CHANNELS, tiles: int = TILES
) -> int:
    """Compute convolutions by the transforms of Winograd, where that is faster.

    Cases:
        1. 3x3, a pixel of padding, nothing skipped, constant weights of fp32, enough channels on both sides, and a
           picture of known size: the largest tile that leaves enough of them.
        2. A picture of unknown size: the largest tile, unless there are :data:`WIDE` channels or more.
        3. Anything else, such as weights of 8 bits: left as it is.

    Pictures that tiles do not divide are filled up with zeros, and the results cut.

    Args:
        model: OpenVINO's model, changed in place.
        sdk: The Python module ``openvino``.
        largest: Largest tile, 2 or 4, or 0 for none. In bf16, what rounding loses is 7 times that of a plain
            convolution with 4, and 2.3 times with 2.
        channels: Fewest channels that are worth it.
        tiles: Fewest tiles of a picture that are worth it.

    Returns:
        The number of convolutions that changed.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    return sum(_convolve(node, sdk, largest, channels, tiles) for node in found)


def _convolve(convolution: Any, sdk: ModuleType, largest: int, channels: int, tiles: int) -> bool:
    weights = convolution.input_value(1).get_node()
    if weights.get_type_name() != "Constant" or weights.get_element_type().get_type_name() != "f32":
        return False
    fewest = min(weights.data.shape[:2])
    if not is_plain_3x3(convolution) or fewest < channels:
        return False
    shape = convolution.get_input_partial_shape(0)
    height, width = (shape[axis].get_length() if shape[axis].is_static else 0 for axis in (2, 3))
    if height and width:
        tile = max((size for size in _POINTS if size <= largest and _tiles(height, width, size) >= tiles), default=0)
    else:
        tile = 0 if fewest >= WIDE else largest
    if tile:
        _put(convolution, sdk, transforms(tile), (height, width))
    return tile > 0


def _tiles(height: int, width: int, size: int) -> int:
    """Tiles of a picture, those that it does not fill included."""
    return -(-height // size) * -(-width // size)


def _put(convolution: Any, sdk: ModuleType, by: Transforms, lengths: _Pair) -> None:
    """Put operators that compute the same in place of a convolution."""
    op, picture = sdk.opset13, convolution.input_value(0)
    kernels = _kernels(convolution.input_value(1).get_node().data, by)
    points = [
        [
            op.convolution(pixels, op.constant(kernel, shared_memory=True), [1, 1], [0, 0], [0, 0], [1, 1])
            for pixels, kernel in zip(*row, strict=True)
        ]
        for row in zip(_pixels(picture, op, by, lengths, kernels.shape[3]), kernels, strict=True)
    ]
    halfway = [_results(row, op, by) for row in points]
    columns = [_results([row[place] for row in halfway], op, by) for place in range(by.tile)]
    phases = [columns[column][row] for row in range(by.tile) for column in range(by.tile)]
    woven = op.depth_to_space(op.concat(phases, 1), "blocks_first", by.tile)
    if not all(length and length % by.tile == 0 for length in lengths):
        size = op.gather(op.shape_of(picture), op.constant([2, 3]), op.constant(0))
        woven = op.slice(woven, op.constant([0, 0]), size, op.constant([1, 1]), op.constant([2, 3]))
    woven.set_friendly_name(convolution.get_friendly_name())
    replace(convolution.output(0), woven.output(0))


def _kernels(kernel: NDArray[np.float32], by: Transforms) -> NDArray[np.float32]:
    """Transformed kernels, ``[m + 2, m + 2, outputs, inputs, 1, 1]``."""
    outputs, inputs, *taps = kernel.shape
    points = len(by.kernel)
    both = np.kron(by.kernel, by.kernel).astype(np.float32)  # rows and columns at once: one product of matrices
    transformed = both @ kernel.reshape(outputs * inputs, taps[0] * taps[1]).T
    return transformed.reshape(points, points, outputs, inputs, 1, 1)


@dataclass(frozen=True)
class _Taps:
    """Entries of a row of ``pixels`` that are not zero, if they are evenly spaced.

    Attributes:
        values: The entries.
        first: Where the first one is.
        step: How far apart they are.
        end: Padding after the picture, along this dimension.
    """

    values: Matrix
    first: int
    step: int
    end: int


def _taps(row: Matrix, tile: int, length: int) -> _Taps:
    places = np.flatnonzero(row)
    step = int(np.gcd.reduce(np.diff(places)))
    first, last = int(places[0]), int(places[-1])
    # With a length that tiles divide, the last pixel met is the one after the picture, or one before that. With any
    # other, and one that is not known, as many tiles are computed as start inside of the picture.
    divided = length > 0 and length % tile == 0
    return _Taps(row[first : last + 1 : step], first, step, max(last - tile, 0) if divided else last - 1)


def _pixels(picture: Any, op: Any, by: Transforms, lengths: _Pair, channels: int) -> list[list[Any]]:
    """The picture's transformed pixels, a picture with one pixel a tile for each point."""
    rows, columns = ([_taps(row, by.tile, length) for row in by.pixels] for length in lengths)
    if by.tile == 2:  # two taps a dimension: both dimensions at once take no more products
        return [[_met(picture, op, by.tile, channels, row, column) for column in columns] for row in rows]
    halfway = [_met(picture, op, by.tile, channels, row, None) for row in rows]
    return [[_met(half, op, by.tile, channels, None, column) for column in columns] for half in halfway]


def _met(picture: Any, op: Any, tile: int, channels: int, row: _Taps | None, column: _Taps | None) -> Any:
    """A convolution of every channel by itself with the taps of a row, a column, or both."""
    nothing = _Taps(np.ones(1), 1, 1, 0)
    both = (row or nothing, column or nothing)
    kernel = np.outer(both[0].values, both[1].values).astype(np.float32)
    return op.group_convolution(
        picture,
        op.constant(np.ascontiguousarray(np.broadcast_to(kernel, (channels, 1, 1, *kernel.shape)))),
        [tile if each else 1 for each in (row, column)],
        [1 - each.first for each in both],
        [each.end for each in both],
        [each.step for each in both],
    )


def _results(points: Sequence[Any], op: Any, by: Transforms) -> list[Any]:
    """Results of a tile along one dimension, from what came of its points.

    Points come in pairs p and -p, whose sums count in even results and differences in odd ones.
    """
    first, last = points[0], points[-1]
    pairs = list(zip(points[1:-1:2], points[2:-1:2], strict=True))
    mixed = [[op.add(one, other) for one, other in pairs], [op.subtract(one, other) for one, other in pairs]]
    found = []
    for power in range(by.tile):
        parts = [
            part if factor == 1 else op.multiply(part, op.constant(np.float32(factor)))
            for part, factor in zip(mixed[power % 2], by.results[power, 1:-1:2], strict=True)
        ]
        total = parts[0] if len(parts) == 1 else op.add(*parts)
        if power == 0:
            total = op.add(first, total)
        if power == by.tile - 1:
            total = op.add(total, last)
        found.append(total)
    return found
