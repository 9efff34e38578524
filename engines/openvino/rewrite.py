"""Rewrite OpenVINO models before they are compiled: the same results from fewer multiplications or fewer copies.

Results agree to rounding. Sums of 8-bit kernels are rounded to 8 bits once more, and convolutions by tiles round more
than plain ones, see :mod:`latentrt.engines.openvino.winograd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph import is_plain_3x3, replace
from .winograd import convolve_by_tiles, largest_tile

VERSION = 2
"""Rises when a rewrite changes. It is a part of a compiled model's key, so that no older one is opened."""

# By phase (even, odd): the groups of taps, of a kernel of three, that meet the same pixel before upsampling. At an even
# pixel 2i the first tap meets pixel i - 1, and the other two meet pixel i. At an odd pixel 2i + 1 the first two meet
# pixel i, and the last meets pixel i + 1.
_TAPS = (((0,), (1, 2)), ((0, 1), (2,)))
_LARGEST = 127.0  # largest magnitude of a symmetric 8-bit integer


@dataclass(frozen=True)
class Weights:
    """Constant weights of a product.

    Attributes:
        values: The weights, dequantised, in the element type of the product.
        stored: Whether the model stores them in 8 bits, with one scale for each output channel.
        axis: Axis of the output channels.
    """

    values: NDArray[np.floating]
    stored: bool
    axis: int


def rewrite(model: Any, sdk: ModuleType, computed_in: str) -> int:
    """Apply every rewrite to a model, each where it fits.

    Steps:
        1. :func:`convolve_before_upsampling`. It comes before step 3, which would take these convolutions first.
        2. :func:`split_gates`.
        3. :func:`~latentrt.engines.openvino.winograd.convolve_by_tiles`, with tiles that suit the precision.

    Args:
        model: OpenVINO's model as it was read, changed in place.
        sdk: The Python module ``openvino``.
        computed_in: ``"fp32"`` or ``"bf16"``, the precision of everything that is not quantised.

    Returns:
        The number of convolutions and layers that changed.
    """
    places = convolve_before_upsampling(model, sdk) + split_gates(model, sdk)
    return places + convolve_by_tiles(model, sdk, largest=largest_tile(computed_in))


def convolve_before_upsampling(model: Any, sdk: ModuleType) -> int:
    """Compute convolutions that follow an upsampling on the small image, before it is upsampled.

    Nearest upsampling by two repeats every pixel four times, so the nine taps of a 3x3 kernel meet only 2x2 different
    pixels. Taps that meet the same pixel are summed beforehand. Which taps these are depends on whether a result's row
    and column are even or odd: the convolution becomes four convolutions of 2x2, one for each phase, whose results are
    interleaved. Each result takes 4 multiplications for each channel where it took 9. (Shi et al. 2016, "Is the
    deconvolution layer the same as a convolutional layer?", arXiv 1609.07009.)

    Cases:
        1. ``Interpolate`` (nearest, exactly twice as high and wide), then ``Convolution`` (3x3, padding of one pixel,
           strides and dilations of 1) with constant weights: rewritten.
        2. The same with ``FakeQuantize`` and its casts in between, or weights in 8 bits: rewritten. Rounding each value
           by itself commutes with repeating it, so it moves to the small image. Summed weights are quantised again,
           with one scale for each output channel.
        3. An upsampled image that another node uses too, and other sizes, strides, paddings or weights: unchanged.

    Steps, for each convolution of cases 1 and 2:
        1. What stands between the two takes the small image.
        2. Four convolutions with the summed kernels of :data:`_TAPS` take its result; the padding of each is on the
           sides where its kernel reaches over the edge.
        3. ``Concat`` and ``DepthToSpace`` interleave their results, which take the convolution's place.

    Args:
        model: OpenVINO's model, changed in place.
        sdk: The Python module ``openvino``.

    Returns:
        The number of convolutions that changed.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    return sum(_convolve_before(node, sdk) for node in found)


def _convolve_before(convolution: Any, sdk: ModuleType) -> bool:
    # Case 3.
    chain = _to_upsampling(convolution)
    if chain is None or not is_plain_3x3(convolution):
        return False
    weights = _weights(convolution.input_value(1), axis=0)
    if weights is None:
        return False
    op = sdk.opset13
    upsampling, *between = chain
    small = upsampling.input_value(0)
    # Step 1.
    if between:
        between[0].input(0).replace_source_output(small)
        for node in between:
            node.validate_and_infer_types()
        small = between[-1].output(0)
    # Step 2.
    phases = [
        op.convolution(
            small, _constant(_phase(weights, row, column), op), [1, 1], [1 - row, 1 - column], [row, column], [1, 1]
        )
        for row in (0, 1)
        for column in (0, 1)
    ]
    # Step 3.
    interleaved = op.depth_to_space(op.concat(phases, 1), "blocks_first", 2)
    interleaved.set_friendly_name(convolution.get_friendly_name())
    replace(convolution.output(0), interleaved.output(0))
    return True


def split_gates(model: Any, sdk: ModuleType) -> int:
    """Compute the two halves of a gated layer (such as GEGLU, Shazeer 2020, arXiv 2002.05202) as two products.

    A column of a product depends on that column of the matrix alone, so cutting the matrix gives the same halves as
    cutting the product. The halves need no copy then, and OpenVINO can fuse what follows a half (an activation, the
    multiplication by the other half) with its product.

    Cases:
        1. ``MatMul`` with a constant matrix, ``Add`` of a constant, ``Split`` in two along the last axis: rewritten.
        2. The same with the matrix in 8 bits: rewritten, with the halves quantised again.
        3. A product or sum that another node uses too, a transposed operand, another axis: unchanged.

    Steps, for each ``Split`` of cases 1 and 2:
        1. The matrix and the added vector are cut in two by columns.
        2. A product and a sum for each half take the place of the outputs of ``Split``.

    Args:
        model: OpenVINO's model, changed in place.
        sdk: The Python module ``openvino``.

    Returns:
        The number of layers that changed.
    """
    return sum(_split_gate(node, sdk) for node in model.get_ordered_ops() if node.get_type_name() == "Split")


def _split_gate(split: Any, sdk: ModuleType) -> bool:
    # Case 3: the chain is followed from its end, and given up at the first node that does not fit.
    total = split.input_value(0)
    add, axis = total.get_node(), _constant_of(split, 1)
    if add.get_type_name() != "Add" or axis is None or split.get_output_size() != 2 or not _used_once(total):
        return False
    product, bias = add.input_value(0), _constant_of(add, 1)
    matmul = product.get_node()
    if matmul.get_type_name() != "MatMul" or bias is None or not _used_once(product):
        return False
    attributes, weights = matmul.get_attributes(), _weights(matmul.input_value(1), axis=1)
    last = _rank(total.get_partial_shape()) - 1
    if weights is None or any(attributes.values()) or int(axis.data) not in (-1, last):
        return False
    if weights.values.ndim != 2 or bias.data.shape != (weights.values.shape[1],):
        return False
    op = sdk.opset13
    # Step 1.
    halves = zip(np.split(weights.values, 2, axis=1), np.split(bias.data, 2), strict=True)
    # Step 2.
    for place, (matrix, vector) in enumerate(halves):
        half = Weights(np.ascontiguousarray(matrix), weights.stored, weights.axis)
        added = op.add(op.matmul(matmul.input_value(0), _constant(half, op), False, False), op.constant(vector.copy()))
        replace(split.output(place), added.output(0))
    return True


def _used_once(value: Any) -> bool:
    return len(value.get_target_inputs()) == 1


def _to_upsampling(convolution: Any) -> list[Any] | None:
    """Return the nodes from an upsampling up to a convolution's input; ``None`` if there is no such chain.

    Between the two only roundings to 8 bits may stand, and no node but the next one may use any of the results.
    """
    chain: list[Any] = []
    value = convolution.input_value(0)
    while _used_once(value):
        node = value.get_node()
        chain.insert(0, node)
        if node.get_type_name() == "Interpolate":
            return chain if _doubles(node) else None
        if node.get_type_name() not in ("Multiply", "Subtract", "Convert", "FakeQuantize") or not _per_tensor(node):
            return None
        value = node.input_value(0)
    return None


def _per_tensor(node: Any) -> bool:
    """Whether all inputs but the first are single numbers: the node then treats every pixel alike."""
    return all(_size(node.input_value(place)) == 1 for place in range(1, node.get_input_size()))


def _size(value: Any) -> int:
    shape = value.get_partial_shape()
    return int(np.prod(list(shape.to_shape()), dtype=np.int64)) if shape.is_static else 0


def _rank(shape: Any) -> int:
    """Return the number of dimensions; 0 if it is unknown."""
    return 0 if shape.rank.is_dynamic else int(shape.rank.get_length())


def _doubles(node: Any) -> bool:
    """Whether an ``Interpolate`` repeats every pixel of an image ``[batch, channels, h, w]`` in a square of four.

    Cases:
        1. Another mode than nearest, other coordinates, another rank, or padding: no.
        2. A size that is computed from scales: yes if they are constant, 2 for height and width, and 1 elsewhere.
        3. A size that is given: yes if height and width are known before and after, and exactly double.
    """
    # Case 1. With asymmetric coordinates and rounding down, result i comes from pixel i // 2.
    before, after = node.get_input_partial_shape(0), node.get_output_partial_shape(0)
    attributes = node.get_attributes()
    wanted = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if any(attributes[name] != value for name, value in wanted.items()) or _rank(before) != 4:
        return False
    if any(attributes["pads_begin"]) or any(attributes["pads_end"]):
        return False
    # Case 2.
    if attributes["shape_calculation_mode"] == "scales":
        scales, axes = (_constant_of(node, place) if place < node.get_input_size() else None for place in (1, 2))
        if scales is None or (axes is None and node.get_input_size() > 2):
            return False
        by = zip(range(4) if axes is None else axes.data.tolist(), scales.data.tolist(), strict=True)
        return {axis: factor for axis, factor in by if factor != 1} == {2: 2.0, 3: 2.0}
    # Case 3.
    lengths = [(before[axis], after[axis]) for axis in (2, 3)]
    known = all(small.is_static and large.is_static for small, large in lengths)
    return known and all(2 * small.get_length() == large.get_length() for small, large in lengths)


def _constant_of(node: Any, place: int) -> Any:
    source = node.input_value(place).get_node()
    return source if source.get_type_name() == "Constant" else None


def _weights(value: Any, axis: int) -> Weights | None:
    """Read constant weights; ``None`` if they are no constant.

    Cases:
        1. An element type other than fp32 and fp16: ``None``.
        2. A ``Constant``.
        3. A ``Multiply`` of a constant in 8 bits (cast, less its zero points) and constant scales.
        4. Anything else: ``None``.
    """
    node = value.get_node()
    if node.get_element_type().get_type_name() not in ("f32", "f16"):  # case 1
        return None
    if node.get_type_name() == "Constant":  # case 2
        return Weights(node.data, False, axis)
    if node.get_type_name() != "Multiply":  # case 4
        return None
    # Case 3.
    centred, scales = (_folded(node.input_value(place)) for place in (0, 1))
    if centred is None or scales is None:
        return None
    return Weights((centred * scales).astype(node.get_element_type().to_dtype()), True, axis)


def _folded(value: Any) -> NDArray[np.float32] | None:
    """Compute a value made by ``Convert``, ``Reshape`` and ``Subtract`` of constants; ``None`` for any other value."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.asarray(node.data, np.float32)
    if kind == "Convert":
        return _folded(node.input_value(0))
    if kind == "Reshape" and node.get_output_partial_shape(0).is_static:
        inner = _folded(node.input_value(0))
        return None if inner is None else inner.reshape(list(node.get_output_shape(0)))
    if kind == "Subtract":
        parts = [_folded(node.input_value(place)) for place in (0, 1)]
        return None if parts[0] is None or parts[1] is None else parts[0] - parts[1]
    return None


def _phase(weights: Weights, row: int, column: int) -> Weights:
    """Return the 2x2 kernel of one phase: ``row`` and ``column`` are 0 for even ones, and 1 for odd ones."""
    rows = np.stack([weights.values[:, :, list(taps)].sum(2, np.float32) for taps in _TAPS[row]], 2)
    both = np.stack([rows[..., list(taps)].sum(-1) for taps in _TAPS[column]], -1)
    return Weights(np.ascontiguousarray(both, weights.values.dtype), weights.stored, weights.axis)


def _constant(weights: Weights, op: Any) -> Any:
    """Return weights as the model stores them: as a constant, or as one in 8 bits that is multiplied with scales."""
    if not weights.stored:
        return op.constant(weights.values)
    others = tuple(axis for axis in range(weights.values.ndim) if axis != weights.axis)
    kind = weights.values.dtype
    largest = np.abs(weights.values).max(axis=others, keepdims=True).astype(np.float32)
    scales = np.maximum(largest / np.float32(_LARGEST), np.finfo(kind).tiny).astype(kind)
    stored = np.clip(np.rint(weights.values / scales.astype(np.float32)), -_LARGEST, _LARGEST).astype(np.int8)
    return op.multiply(op.convert(op.constant(stored), kind.name.replace("float", "f")), op.constant(scales))
