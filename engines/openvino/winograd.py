"""Winograd convolution in OpenVINO models: 3x3 convolutions with fewer multiplications than their kernels have taps.

The image is cut into tiles that overlap. A tile of m x m results depends on (m + 2) x (m + 2) pixels. Pixels and kernel
are transformed, multiplied point by point, and the products are transformed back into results. Over many channels each
point is a product of matrices: (m + 2)^2 of them replace 9 m^2, which is 16 for 36 with m = 2, and 36 for 144 with
m = 4. (Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2015, "Fast algorithms for convolutional
neural networks", arXiv 1509.09308.)

The transforms add rounding errors, which grow with the tile; tiles of 4 are for fp32 only. The rewrite uses operators
that OpenVINO has, and no kernel of its own. Its thresholds were measured on x86-64 with AVX-512 and without AMX, see
:func:`largest_tile`.
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

# Measured by benchmarks/studies/winograd.py; its table is in docs/benchmarks.md.
CHANNELS = 256
"""Fewest input and output channels to transform: with fewer, the transforms cost as much as they save."""
TILES = 64
"""Fewest tiles of an image to transform: with fewer, reading the transformed weights, which are larger, costs more."""
WIDE = 1024
"""Channels, on both sides, from which an image of unknown size is assumed to have fewer than ``TILES`` tiles."""

_CPUINFO = Path("/proc/cpuinfo")
_LARGEST = {"fp32": 4, "bf16": 2}  # in bf16, tiles of 4 lose too much to rounding

# The points at which the polynomials are evaluated, besides infinity; after 0 they come in pairs p and -p. {0, 1, -1}
# is Lavin and Gray's choice. For tiles of 4 the points here have half the rounding error of their {0, 1, -1, 2, -2},
# since they keep the entries of all three matrices near 1 (after Barabasz et al. 2020, "Error analysis and improving
# the accuracy of Winograd convolution", arXiv 1803.10986).
_POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
}


@dataclass(frozen=True)
class Transforms:
    """The matrices of tiles of m results: ``results @ ((kernel @ g) * (pixels @ d))`` convolves d with g.

    Lavin and Gray call them A transposed, G, and B transposed (equation 4).

    Attributes:
        results: Maps points to results, ``[m, m + 2]``.
        kernel: Maps the three taps g of a kernel to points, ``[m + 2, 3]``.
        pixels: Maps the pixels d of a tile to points, ``[m + 2, m + 2]``.
    """

    results: Matrix
    kernel: Matrix
    pixels: Matrix

    @property
    def tile(self) -> int:
        """The number m of results of a tile along one dimension."""
        return len(self.results)


@cache
def transforms(tile: int) -> Transforms:
    """Compute the matrices of a tile size, 2 or 4, by the construction of Toom and Cook.

    The product of two polynomials of m + 2 coefficients is found from their values at m + 1 points and at infinity;
    a convolution is the transpose of that. Fractions keep the matrices exact until the end.

    Steps:
        1. ``results`` has the powers of the points as columns; infinity counts in the highest power alone.
        2. ``kernel`` evaluates the kernel at the points, over Lagrange's denominators.
        3. ``pixels`` has the coefficients of Lagrange's numerators as rows, and for infinity those of the polynomial
           that vanishes at all points.
    """
    points = _POINTS[tile]
    others = [[each for each in points if each != point] for point in points]
    # Step 1.
    results = [[point**power for point in points] + [Fraction(power == tile - 1)] for power in range(tile)]
    # Step 2.
    kernel = [
        [point**power / _product(point - other for other in rest) for power in range(3)]
        for point, rest in zip(points, others, strict=True)
    ]
    kernel.append([Fraction(0), Fraction(0), Fraction(1)])
    # Step 3.
    pixels = [[*_polynomial(rest), Fraction(0)] for rest in others]
    pixels.append(_polynomial(points))
    return Transforms(*(np.array(each, np.float64) for each in (results, kernel, pixels)))


def _product(factors: Any) -> Fraction:
    result = Fraction(1)
    for factor in factors:
        result *= factor
    return result


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the monic polynomial with these roots, lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        found = [low - root * high for low, high in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


def largest_tile(computed_in: str) -> int:
    """Return the largest tile that is worth it on this processor, 0 for none.

    Cases:
        1. Processors other than x86-64: none. On ARM OpenVINO's library has Winograd kernels of its own.
        2. bf16 with AMX: none. Products are so fast there that moving pixels may cost more than it saves; this has not
           been measured.
        3. x86-64 otherwise: 4 in fp32, 2 in bf16.

    Args:
        computed_in: ``"fp32"`` or ``"bf16"``.
    """
    if platform.machine() not in ("x86_64", "AMD64"):  # case 1
        return 0
    # Cases 2 and 3.
    return 0 if computed_in == "bf16" and _has_amx() else _LARGEST[computed_in]


def _has_amx() -> bool:
    """Whether the processor has Intel's AMX instructions for bf16; known on Linux only, and taken for no elsewhere."""
    return _CPUINFO.is_file() and "amx_bf16" in _CPUINFO.read_text(encoding="utf-8", errors="replace").split()


def convolve_by_tiles(
    model: Any, sdk: ModuleType, *, largest: int, channels: int = CHANNELS, tiles: int = TILES
) -> int:
    """Replace convolutions by Winograd's transforms, where that is faster.

    Cases:
        1. Unchanged: weights that are not constant or not fp32 (8-bit weights among them), a kernel that is not 3x3
           with padding of one pixel and strides and dilations of 1, and too few channels.
        2. An image of known size: the largest tile of which the image has enough, or no change.
        3. An image of unknown size: the largest tile, or no change with :data:`WIDE` channels or more. In a U-Net the
           widest layers have the smallest images.

    Steps, for each convolution that changes, with tiles of m x m results:
        1. The kernels are transformed here, once: (m + 2)^2 matrices ``[outputs, inputs]``.
        2. Convolutions of each channel by itself (``GroupConvolution``, stride m) transform the pixels: one image for
           each point, with one pixel for each tile.
        3. A convolution of 1x1 with its matrix multiplies each point over all channels.
        4. Sums transform the points into results, along one dimension after the other.
        5. ``Concat`` and ``DepthToSpace`` put the results of each tile together.
        6. If tiles do not divide the image, padding has filled it up with zeros, and the surplus results are cut off.

    Args:
        model: OpenVINO's model, changed in place.
        sdk: The Python module ``openvino``.
        largest: Largest tile to take, 2 or 4, or 0 for none. In bf16 the rounding error of tiles of 4 is 7 times that
            of a plain convolution, and that of tiles of 2 is 2.3 times.
        channels: Fewest channels on both sides.
        tiles: Fewest tiles of an image.

    Returns:
        The number of convolutions that changed.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    return sum(_convolve(node, sdk, largest, channels, tiles) for node in found)


def _convolve(convolution: Any, sdk: ModuleType, largest: int, channels: int, tiles: int) -> bool:
    # Case 1.
    weights = convolution.input_value(1).get_node()
    if weights.get_type_name() != "Constant" or weights.get_element_type().get_type_name() != "f32":
        return False
    fewest = min(weights.data.shape[:2])
    if not is_plain_3x3(convolution) or fewest < channels:
        return False
    shape = convolution.get_input_partial_shape(0)
    height, width = (shape[axis].get_length() if shape[axis].is_static else 0 for axis in (2, 3))
    if height and width:  # case 2
        enough = [size for size in _POINTS if size <= largest and _tile_count(height, width, size) >= tiles]
        tile = max(enough, default=0)
    else:  # case 3
        tile = 0 if fewest >= WIDE else largest
    if tile:
        _replace_by_tiles(convolution, sdk, transforms(tile), (height, width))
    return tile > 0


def _tile_count(height: int, width: int, size: int) -> int:
    """Return the number of tiles of an image, those included that it does not fill."""
    return -(-height // size) * -(-width // size)


def _replace_by_tiles(convolution: Any, sdk: ModuleType, by: Transforms, lengths: _Pair) -> None:
    """Replace a convolution by operators that compute the same (steps 1 to 6 of :func:`convolve_by_tiles`).

    Args:
        convolution: The node.
        sdk: The Python module ``openvino``.
        by: Transforms of the tile size.
        lengths: Height and width of the image; 0 for one that is unknown.
    """
    op, image = sdk.opset13, convolution.input_value(0)
    # Steps 1 to 3.
    kernels = _transform_kernels(convolution.input_value(1).get_node().data, by)
    points = [
        [
            op.convolution(pixels, op.constant(kernel, shared_memory=True), [1, 1], [0, 0], [0, 0], [1, 1])
            for pixels, kernel in zip(*row, strict=True)
        ]
        for row in zip(_transform_pixels(image, op, by, lengths, kernels.shape[3]), kernels, strict=True)
    ]
    # Step 4: along the columns within each row of points, then along the rows.
    halfway = [_results(row, op, by) for row in points]
    columns = [_results([row[place] for row in halfway], op, by) for place in range(by.tile)]
    # Step 5.
    phases = [columns[column][row] for row in range(by.tile) for column in range(by.tile)]
    joined = op.depth_to_space(op.concat(phases, 1), "blocks_first", by.tile)
    # Step 6.
    if not all(length and length % by.tile == 0 for length in lengths):
        size = op.gather(op.shape_of(image), op.constant([2, 3]), op.constant(0))
        joined = op.slice(joined, op.constant([0, 0]), size, op.constant([1, 1]), op.constant([2, 3]))
    joined.set_friendly_name(convolution.get_friendly_name())
    replace(convolution.output(0), joined.output(0))


def _transform_kernels(kernel: NDArray[np.float32], by: Transforms) -> NDArray[np.float32]:
    """Return the transformed kernels, ``[m + 2, m + 2, outputs, inputs, 1, 1]``, of ``[outputs, inputs, 3, 3]``."""
    outputs, inputs, *taps = kernel.shape
    points = len(by.kernel)
    both = np.kron(by.kernel, by.kernel).astype(np.float32)  # rows and columns at once: one product of matrices
    transformed = both @ kernel.reshape(outputs * inputs, taps[0] * taps[1]).T
    return transformed.reshape(points, points, outputs, inputs, 1, 1)


@dataclass(frozen=True)
class _Taps:
    """A row of ``Transforms.pixels`` as a convolution along one dimension: its entries, but for zeros outside.

    Attributes:
        values: The evenly spaced entries between the first and the last that are not zero.
        first: Index of the first one.
        step: Distance between two of them, the convolution's dilation.
        end: Padding behind the image along this dimension.
    """

    values: Matrix
    first: int
    step: int
    end: int


def _taps(row: Matrix, tile: int, length: int) -> _Taps:
    places = np.flatnonzero(row)
    step = int(np.gcd.reduce(np.diff(places)))
    first, last = int(places[0]), int(places[-1])
    # If tiles divide the length, the last tile reaches one pixel beyond the image at most. With any other length, and
    # an unknown one, every tile that starts inside the image is computed.
    divided = length > 0 and length % tile == 0
    return _Taps(row[first : last + 1 : step], first, step, max(last - tile, 0) if divided else last - 1)


def _transform_pixels(image: Any, op: Any, by: Transforms, lengths: _Pair, channels: int) -> list[list[Any]]:
    """Return the transformed pixels: for each point an image that has one pixel for each tile."""
    rows, columns = ([_taps(row, by.tile, length) for row in by.pixels] for length in lengths)
    if by.tile == 2:  # two taps in each dimension: both dimensions at once take no more multiplications
        return [[_convolve_channels(image, op, by.tile, channels, row, column) for column in columns] for row in rows]
    halfway = [_convolve_channels(image, op, by.tile, channels, row, None) for row in rows]
    return [[_convolve_channels(half, op, by.tile, channels, None, column) for column in columns] for half in halfway]


def _convolve_channels(image: Any, op: Any, tile: int, channels: int, row: _Taps | None, column: _Taps | None) -> Any:
    """Convolve every channel by itself with the taps of a row, of a column, or of both; ``None`` leaves that axis."""
    identity = _Taps(np.ones(1), 1, 1, 0)
    both = (row or identity, column or identity)
    kernel = np.outer(both[0].values, both[1].values).astype(np.float32)
    return op.group_convolution(
        image,
        op.constant(np.ascontiguousarray(np.broadcast_to(kernel, (channels, 1, 1, *kernel.shape)))),
        [tile if each else 1 for each in (row, column)],
        [1 - each.first for each in both],
        [each.end for each in both],
        [each.step for each in both],
    )


def _results(points: Sequence[Any], op: Any, by: Transforms) -> list[Any]:
    """Multiply ``by.results`` with a tile's points along one dimension.

    The points after 0 come in pairs p and -p, whose powers differ in the sign of the odd ones: even results take the
    sums of the two, and odd results their differences.
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
