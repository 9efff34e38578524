"""Quantise the products of a graph to 8 bits, written as ``QuantizeLinear`` and ``DequantizeLinear``.

Quantisation is symmetric: a number is a scale times a stored number of 8 bits, and zero points are zero (Jacob et al.
2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877).
The pass writes the roundings into the graph. Engines recognise the pair of operators and compute the product in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .builder import Builder

# Smallest normal numbers. A scale below them would lose bits, or be flushed to zero.
_SMALLEST = {ir.DataType.FLOAT: 2.0**-126, ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}


@dataclass(frozen=True)
class NumberFormat:
    """A symmetric 8-bit format: a number is a scale times the stored number.

    Attributes:
        name: ``"int8"`` or ``"fp8"``.
        dtype: ONNX element type of the stored numbers.
        largest: Largest magnitude of a stored number.
    """

    name: str
    dtype: ir.DataType
    largest: float

    def store(self, values: NDArray[np.float32]) -> ir.Tensor:
        """Round numbers, already divided by their scale, to the nearest stored ones (ties to even), with saturation."""
        bounded = np.clip(values, -self.largest, self.largest)
        if self.dtype == ir.DataType.INT8:
            return ir.Tensor(np.rint(bounded).astype(np.int8))
        return ir.Tensor(bounded.astype(ml_dtypes.float8_e4m3fn), dtype=self.dtype)


FORMATS = {
    "int8": NumberFormat("int8", ir.DataType.INT8, 127.0),
    "fp8": NumberFormat("fp8", ir.DataType.FLOAT8E4M3FN, 448.0),
}
"""Formats by name. int8 does without -128, so that it is symmetric. fp8 is E4M3 (Micikevicius et al. 2022, "FP8 Formats
for Deep Learning", arXiv 2209.05433), which has no infinities."""


@dataclass(frozen=True)
class Layer:
    """A product of activations with constant weights, which :func:`quantize` can quantise.

    Attributes:
        name: Name of the node.
        operator: ``Conv``, ``MatMul`` or ``Gemm``.
        activation: Name of the activations' value.
        weight: Name of the weights.
        axis: Axis of the weights that has an entry for each output channel.
        depth: Number of products in the sum of one output element.
    """

    name: str
    operator: str
    activation: str
    weight: str
    axis: int
    depth: int


def find_layers(graph: ir.Graph) -> list[Layer]:
    """Find the products that :func:`quantize` can quantise, in the graph's order.

    Cases:
        1. Not a layer: an operator other than ``Conv``, ``MatMul`` and ``Gemm``, a product whose first input is a
           constant or whose second is not (attention multiplies two activations), and inputs that are not of floating
           point.
        2. A ``Conv``: its output channels are axis 0 of the weights.
        3. A ``MatMul`` or ``Gemm`` with weights of any rank but 2, or a ``Gemm`` whose activation is transposed: not a
           layer.
        4. A ``Gemm`` with a transposed matrix: its output channels are axis 0 of the weights.
        5. A ``MatMul``, or a ``Gemm`` with a matrix that is not transposed: its output channels are axis 1.
    """
    found = []
    for node in graph:
        # Case 1.
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.domain:
            continue
        activation, weight = node.inputs[0], node.inputs[1]
        if activation is None or activation.const_value is not None or activation.dtype not in _SMALLEST:
            continue
        if (
            weight is None
            or weight.const_value is None
            or weight.producer() is not None
            or weight.dtype not in _SMALLEST
        ):
            continue
        shape = weight.const_value.shape.numpy()
        if node.op_type == "Conv":  # case 2
            axis = 0
        elif len(shape) != 2 or node.attributes.get_int("transA", 0):  # case 3
            continue
        else:  # cases 4 and 5
            axis = 0 if node.attributes.get_int("transB", 0) else 1
        depth = math.prod(shape) // shape[axis]
        found.append(Layer(str(node.name), node.op_type, str(activation.name), str(weight.name), axis, depth))
    return found


def weight_scales(
    weights: NDArray[np.float32], axis: int, number: NumberFormat, dtype: ir.DataType
) -> NDArray[np.float32]:
    """Return the scale of each output channel, which maps its largest magnitude to the format's largest number.

    Args:
        weights: Weights of any shape.
        axis: Axis of the output channels.
        number: Format that the weights are stored in.
        dtype: Element type of the scales in the graph; they are rounded up to it.

    Returns:
        Scales, ``[channels]``.
    """
    others = tuple(each for each in range(weights.ndim) if each != axis)
    largest = np.abs(weights).max(axis=others)
    return representable(largest / number.largest, dtype)


def representable(scales: NDArray[np.float32], dtype: ir.DataType) -> NDArray[np.float32]:
    """Round scales up to numbers of an element type, none of them below the smallest normal number.

    A scale that was rounded down would map the largest magnitude beyond the format's largest number, and saturate it.
    """
    kind = dtype.numpy()
    rounded = np.maximum(scales, _SMALLEST[dtype]).astype(kind)
    up = np.nextafter(rounded, kind.type(np.inf))
    return np.where(rounded.astype(np.float32) < scales, up, rounded).astype(np.float32)


def quantize(
    graph: ir.Graph,
    number: NumberFormat,
    ranges: Mapping[str, float] | None,
    *,
    layers: Collection[str] | None = None,
) -> list[str]:
    """Quantise layers of ``graph`` to 8 bits.

    Steps, for each layer:
        1. With ``ranges``, its activation passes through ``QuantizeLinear`` and ``DequantizeLinear`` with one scale.
           Layers with the same activation share the pair.
        2. Its weights are stored in 8 bits with one scale for each output channel, and pass through
           ``DequantizeLinear``. Layers with the same weights share it.

    At the end:
        3. Weights that nothing uses any more are removed.

    Zero points are written out, as zeros: TensorRT takes no others. Biases, and everything that is not a layer, stay.

    Args:
        graph: Changed in place.
        number: Format of the stored numbers.
        ranges: For each activation, the magnitude that becomes the format's largest number; ``None`` quantises the
            weights alone.
        layers: Names of the nodes to quantise; ``None`` quantises every layer.

    Returns:
        Names of the quantised nodes.

    Raises:
        ValueError: for a layer that cannot be quantised, or whose activation has no range.
    """
    known = {layer.name: layer for layer in find_layers(graph)}
    chosen = list(known) if layers is None else [name for name in known if name in set(layers)]
    if unknown := sorted(set(layers or ()) - known.keys()):
        raise ValueError(f"{unknown[0]!r} is no layer that can be quantised")
    nodes = {node.name: node for node in graph}
    builder = Builder(graph, number.name)
    activations: dict[str, ir.Value] = {}
    weights: dict[tuple[str, int], ir.Value] = {}
    for name in chosen:
        layer, node = known[name], nodes[name]
        source, constant = node.inputs[0], node.inputs[1]
        assert source is not None
        assert constant is not None
        # Step 1.
        if ranges is not None:
            if layer.activation not in ranges:
                raise ValueError(f"there is no range of {layer.activation!r}, which {name!r} takes")
            if layer.activation not in activations:
                activations[layer.activation] = _quantized_activation(
                    builder, source, node, ranges[layer.activation], number
                )
            node.replace_input_with(0, activations[layer.activation])
        # Step 2: weights that two layers use along different axes have two sets of scales.
        key = (layer.weight, layer.axis)
        if key not in weights:
            weights[key] = _quantized_weights(builder, constant, node, layer.axis, number)
        node.replace_input_with(1, weights[key])
    # Step 3.
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return chosen


def _quantized_activation(
    builder: Builder, value: ir.Value, node: ir.Node, largest: float, number: NumberFormat
) -> ir.Value:
    """Return an activation after rounding to 8 bits; the new nodes stand in front of ``node``."""
    dtype = value.dtype
    assert dtype is not None
    scale = representable(np.array([largest / number.largest], np.float32), dtype)[0]
    parameters = [builder.tensor(scale, dtype), builder.tensor(0, number.dtype)]
    builder.before = node
    stored = builder.add("QuantizeLinear", [value, *parameters], number.dtype, value.shape)
    return builder.add("DequantizeLinear", [stored, *parameters], dtype, value.shape)


def _quantized_weights(builder: Builder, value: ir.Value, node: ir.Node, axis: int, number: NumberFormat) -> ir.Value:
    """Return weights that are stored in 8 bits, after ``DequantizeLinear``; that node stands in front of ``node``."""
    dtype, constant = value.dtype, value.const_value
    assert dtype is not None
    assert constant is not None
    array = constant.numpy().astype(np.float32)
    scales = weight_scales(array, axis, number, dtype)
    column = [-1 if each == axis else 1 for each in range(array.ndim)]
    stored = ir.val(f"{value.name}_{number.name}", const_value=number.store(array / scales.reshape(column)))
    builder.graph.register_initializer(stored)
    parameters = [builder.tensor(scales, dtype), builder.tensor(np.zeros(len(scales)), number.dtype)]
    builder.before = node
    return builder.add("DequantizeLinear", [stored, *parameters], dtype, constant.shape, axis=axis)


def quantized_share(graph: ir.Graph, names: Iterable[str]) -> float:
    """Return the named layers' share, 0 to 1, of the weights of all layers."""
    layers, chosen = find_layers(graph), set(names)
    sizes = {layer.name: math.prod(graph.initializers[layer.weight].shape.numpy()) for layer in layers}
    return float(sum(size for name, size in sizes.items() if name in chosen) / max(sum(sizes.values()), 1))
