"""Rewriting of OpenVINO models: the same results from fewer multiplications, or fewer copies, than the graph says.

Results are the same to rounding. Kernels in 8 bits that were added up are rounded to 8 bits once more, and convolutions
by tiles round more than plain ones, see :mod:`latentrt.engines.openvino.winograd`.
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
"""Goes up when a rewriting changes; a part of what decides a compiled model."""

# By phase, which taps of a kernel of three meet the same pixel of the picture before upsampling. The even pixels of the
# upsampled picture see pixel i - 1 with the first tap and pixel i with the other two, the odd ones pixel i with the
# first two and pixel i + 1 with the last.
_TAPS = (((0,), (1, 2)), ((0, 1), (2,)))
_LARGEST = 127.0  # of what 8 bits hold symmetrically


@dataclass(frozen=True)
class Weights:
    """Constant weights of a product.

    Attributes:
        values: In the element type that the product has, in full.
        stored: Whether the model has them in 8 bits, with one scale for each entry of ``axis``.
        axis: Dimension of the output channels.
    """

    values: NDArray[np.floating]
    stored: bool
    axis: int


def rewrite(model: Any, sdk: ModuleType, computed_in: str) -> int:
    """Apply every rewriting to a model that was just read.

    Args:
        model: OpenVINO's model, changed in place.
        sdk: The Python module ``openvino``.
        computed_in: ``"fp32"`` or ``"bf16"``: what is not quantised is computed in.

    Returns:
        How many places changed.
    """
    places = convolve_before_upsampling(model, sdk) + split_gates(model, sdk)
    return places + convolve_by_tiles(model, sdk, largest=largest_tile(computed_in))


def convolve_before_upsampling(model: Any, sdk: ModuleType) -> int:
    """Compute convolutions of pictures that were just made twice as large on the smaller picture.

    Where every pixel is there four times, a 3x3 kernel meets only 2x2 different ones: its taps that meet the same pixel
    are added up beforehand. There are four cases, for even and odd rows and columns, each a convolution of 2x2 with an
    output of its own, and these are woven together. That takes 4 multiplications where there were 9. (Shi et al. 2016,
    "Is the deconvolution layer the same as a convolutional layer?", arXiv 1609.07009.)

    Cases:
        1. ``Interpolate`` (nearest, exactly twice as high and wide), then ``Convolution`` (3x3, a pixel of padding,
           nothing skipped) with constant weights.
        2. The same with ``FakeQuantize`` and its casts between the two, and weights in 8 bits: the sums of weights are
           quantised again, with one scale for each output channel.
        3. An upsampled picture that something else takes too, other sizes, strides or paddings: left as it is.

    Args:
        model: OpenVINO's model, changed in place.
        sdk: The Python module ``openvino``.

    Returns:
        The number of convolutions that changed.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    return sum(_convolve_before(node, sdk) for node in found)


def _convolve_before(convolution: Any, sdk: ModuleType) -> bool:
    chain = _to_upsampling(convolution)
    if chain is None or not is_plain_3x3(convolution):
        return False
    weights = _weights(convolution.input_value(1), axis=0)
    if weights is None:
        return False
    op = sdk.opset13
    upsampling, *between = chain
    small = upsampling.input_value(0)
    if between:  # rounding to 8 bits gives the same before upsampling as after
        between[0].input(0).replace_source_output(small)
        for node in between:
            node.validate_and_infer_types()
        small = between[-1].output(0)
    phases = [
        op.convolution(
            small, _constant(_phase(weights, row, column), op), [1, 1], [1 - row, 1 - column], [row, column], [1, 1]
        )
        for row in (0, 1)
        for column in (0, 1)
    ]
    woven = op.depth_to_space(op.concat(phases, 1), "blocks_first", 2)
    woven.set_friendly_name(convolution.get_friendly_name())
    replace(convolution.output(0), woven.output(0))
    return True


def split_gates(model: Any, sdk: ModuleType) -> int:
    """Compute the halves of a gated layer as two products, in place of one that is cut in two.

    No half is copied then, and what follows a half (an activation, a product with the other one) joins its product.

    Cases:
        1. ``MatMul`` with a constant matrix, ``Add`` of a constant, ``Split`` in two along the last dimension.
        2. The same with the matrix in 8 bits.
        3. A product, or a sum, that something else takes too: left as it is.

    Args:
        model: OpenVINO's model, changed in place.
        sdk: The Python module ``openvino``.

    Returns:
        The number of layers that changed.
    """
    return sum(_split_gate(node, sdk) for node in model.get_ordered_ops() if node.get_type_name() == "Split")


def _split_gate(split: Any, sdk: ModuleType) -> bool:
    total = split.input_value(0)
    add, axis = total.get_node(), _constant_of(split, 1)
    if add.get_type_name() != "Add" or axis is None or split.get_output_size() != 2 or not _taken_once(total):
        return False
    product, bias = add.input_value(0), _constant_of(add, 1)
    matmul = product.get_node()
    if matmul.get_type_name() != "MatMul" or bias is None or not _taken_once(product):
        return False
    attributes, weights = matmul.get_attributes(), _weights(matmul.input_value(1), axis=1)
    last = _rank(total.get_partial_shape()) - 1
    if weights is None or any(attributes.values()) or int(axis.data) not in (-1, last):
        return False
    if weights.values.ndim != 2 or bias.data.shape != (weights.values.shape[1],):
        return False
    op = sdk.opset13
    for place, (matrix, vector) in enumerate(
        zip(np.split(weights.values, 2, axis=1), np.split(bias.data, 2), strict=True)
    ):
        half = Weights(np.ascontiguousarray(matrix), weights.stored, weights.axis)
        added = op.add(op.matmul(matmul.input_value(0), _constant(half, op), False, False), op.constant(vector.copy()))
        replace(split.output(place), added.output(0))
    return True


def _taken_once(value: Any) -> bool:
    return len(value.get_target_inputs()) == 1


def _to_upsampling(convolution: Any) -> list[Any] | None:
    """The nodes from the upsampling to a convolution, if all that is between rounds to 8 bits."""
    chain: list[Any] = []
    value = convolution.input_value(0)
    while _taken_once(value):
        node = value.get_node()
        chain.insert(0, node)
        if node.get_type_name() == "Interpolate":
            return chain if _doubles(node) else None
        if node.get_type_name() not in ("Multiply", "Subtract", "Convert", "FakeQuantize") or not _per_tensor(node):
            return None
        value = node.input_value(0)
    return None


def _per_tensor(node: Any) -> bool:
    """Whether all inputs but the first are single numbers."""
    return all(_size(node.input_value(place)) == 1 for place in range(1, node.get_input_size()))


def _size(value: Any) -> int:
    shape = value.get_partial_shape()
    return int(np.prod(list(shape.to_shape()), dtype=np.int64)) if shape.is_static else 0


def _rank(shape: Any) -> int:
    """Number of dimensions; 0 where that is not known."""
    return 0 if shape.rank.is_dynamic else int(shape.rank.get_length())


def _doubles(node: Any) -> bool:
    """Whether every pixel becomes a square of four."""
    before, after = node.get_input_partial_shape(0), node.get_output_partial_shape(0)
    attributes = node.get_attributes()
    wanted = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if any(attributes[name] != value for name, value in wanted.items()) or _rank(before) != 4:
        return False
    if any(attributes["pads_begin"]) or any(attributes["pads_end"]):
        return False
    if attributes["shape_calculation_mode"] == "scales":
        scales, axes = (_constant_of(node, place) if place < node.get_input_size() else None for place in (1, 2))
        if scales is None or (axes is None and node.get_input_size() > 2):
            return False
        by = zip(range(4) if axes is None else axes.data.tolist(), scales.data.tolist(), strict=True)
        return {axis: factor for axis, factor in by if factor != 1} == {2: 2.0, 3: 2.0}
    lengths = [(before[axis], after[axis]) for axis in (2, 3)]
    known = all(small.is_static and large.is_static for small, large in lengths)
    return known and all(2 * small.get_length() == large.get_length() for small, large in lengths)


def _constant_of(node: Any, place: int) -> Any:
    source = node.input_value(place).get_node()
    return source if source.get_type_name() == "Constant" else None


def _weights(value: Any, axis: int) -> Weights | None:
    """Weights that are a constant, or one in 8 bits with scales and zero points of zero."""
    node = value.get_node()
    if node.get_element_type().get_type_name() not in ("f32", "f16"):
        return None
    if node.get_type_name() == "Constant":
        return Weights(node.data, False, axis)
    if node.get_type_name() != "Multiply":
        return None
    centred, scales = (_folded(node.input_value(place)) for place in (0, 1))
    if centred is None or scales is None:
        return None
    return Weights((centred * scales).astype(node.get_element_type().to_dtype()), True, axis)


def _folded(value: Any) -> NDArray[np.float32] | None:
    """What casts, differences and shapes of constants come to; None where something else is in it."""
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
    """The 2x2 kernel of even or odd rows and columns."""
    rows = np.stack([weights.values[:, :, list(taps)].sum(2, np.float32) for taps in _TAPS[row]], 2)
    both = np.stack([rows[..., list(taps)].sum(-1) for taps in _TAPS[column]], -1)
    return Weights(np.ascontiguousarray(both, weights.values.dtype), weights.stored, weights.axis)


def _constant(weights: Weights, op: Any) -> Any:
    """A constant, or one in 8 bits and what gives it back its scale."""
    if not weights.stored:
        return op.constant(weights.values)
    others = tuple(axis for axis in range(weights.values.ndim) if axis != weights.axis)
    kind = weights.values.dtype
    largest = np.abs(weights.values).max(axis=others, keepdims=True).astype(np.float32)
    scales = np.maximum(largest / np.float32(_LARGEST), np.finfo(kind).tiny).astype(kind)
    stored = np.clip(np.rint(weights.values / scales.astype(np.float32)), -_LARGEST, _LARGEST).astype(np.int8)
    return op.multiply(op.convert(op.constant(stored), kind.name.replace("float", "f")), op.constant(scales))
