"""Quantise the products of a graph to 8 bits, written as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .builder import Builder

# Smallest normal numbers.
_SMALLEST = {ir.DataType.FLOAT: 2.0**-126, ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}


@dataclass(frozen=True)
class NumberFormat:
    """A symmetric 8-bit format: a number is ``scale`` times what it stores.

    Attributes:
        name: ``"int8"`` or ``"fp8"``.
        dtype: Its ONNX element type.
        largest: Largest magnitude that it stores.
    """

    name: str
    dtype: ir.DataType
    largest: float

    def store(self, values: NDArray[np.float32]) -> ir.Tensor:
        """Numbers that were divided by their scale, rounded to nearest (ties to even) and saturated."""
        bounded = np.clip(values, -self.largest, self.largest)
        if self.dtype == ir.DataType.INT8:
            return ir.Tensor(np.rint(bounded).astype(np.int8))
        return ir.Tensor(bounded.astype(ml_dtypes.float8_e4m3fn), dtype=self.dtype)


FORMATS = {
    "int8": NumberFormat("int8", ir.DataType.INT8, 127.0),
    "fp8": NumberFormat("fp8", ir.DataType.FLOAT8E4M3FN, 448.0),
}
"""Formats by name. int8 leaves -128 out, so that it is symmetric; fp8 is E4M3 (Micikevicius et al. 2022, arXiv
2209.05433), without infinities."""


@dataclass(frozen=True)
class Layer:
    """A product of activations with constant weights, which can be quantised.

    Attributes:
        name: Name of the node.
        operator: ``Conv``, ``MatMul`` or ``Gemm``.
        activation: Name of the value that the weights are applied to.
        weight: Name of the weights.
        axis: Dimension of the weights with an entry for each output channel.
        depth: Number of products that are summed for one output.
    """

    name: str
    operator: str
    activation: str
    weight: str
    axis: int
    depth: int


def find_layers(graph: ir.Graph) -> list[Layer]:
    """Products that can be quantised, in the graph's order.

    Cases:
        1. ``Conv`` whose weights are constant: one scale for each output channel.
        2. ``MatMul`` of an activation with a constant matrix: one scale for each column.
        3. ``Gemm`` with a constant matrix, transposed or not, and an activation that is not transposed.
        4. Everything else stays as it is: products of two activations (attention), constants that are no weights.
    """
    found = []
    for node in graph:
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
        if node.op_type == "Conv":
            axis = 0
        elif len(shape) != 2 or node.attributes.get_int("transA", 0):
            continue
        else:
            axis = 0 if node.attributes.get_int("transB", 0) else 1
        depth = math.prod(shape) // shape[axis]
        found.append(Layer(str(node.name), node.op_type, str(activation.name), str(weight.name), axis, depth))
    return found


def weight_scales(
    weights: NDArray[np.float32], axis: int, number: NumberFormat, dtype: ir.DataType
) -> NDArray[np.float32]:
    """Scale of each output channel: the largest magnitude becomes the format's largest number.

    Args:
        weights: Any shape.
        axis: Dimension of the output channels.
        number: The format.
        dtype: Element type that the scales will have; they are rounded to it, upwards.
    """
    others = tuple(each for each in range(weights.ndim) if each != axis)
    largest = np.abs(weights).max(axis=others)
    return representable(largest / number.largest, dtype)


def representable(scales: NDArray[np.float32], dtype: ir.DataType) -> NDArray[np.float32]:
    """Scales rounded up to what an element type can hold, and none of them zero or too small for a normal number."""
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

    Cases:
        1. An activation passes through ``QuantizeLinear`` and ``DequantizeLinear`` with one scale; layers that share it
           share the pair.
        2. Weights are stored in 8 bits, with one scale for each output channel, and pass through ``DequantizeLinear``;
           layers that share them share it.
        3. Without ``ranges`` activations are left as they are.
        4. Zero points are there, and zero: TensorRT takes no others. Biases stay as they are.

    Args:
        graph: Changed in place.
        number: The format.
        ranges: For each activation, the magnitude that becomes the format's largest number; ``None`` quantises the
            weights alone.
        layers: Names of the nodes to quantise; all that can be if left out.

    Returns:
        Names of the nodes that were quantised.

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
        if ranges is not None:
            if layer.activation not in ranges:
                raise ValueError(f"there is no range of {layer.activation!r}, which {name!r} takes")
            if layer.activation not in activations:
                activations[layer.activation] = _through(builder, source, node, ranges[layer.activation], number)
            node.replace_input_with(0, activations[layer.activation])
        key = (layer.weight, layer.axis)
        if key not in weights:
            weights[key] = _stored(builder, constant, node, layer.axis, number)
        node.replace_input_with(1, weights[key])
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return chosen


def _through(builder: Builder, value: ir.Value, node: ir.Node, largest: float, number: NumberFormat) -> ir.Value:
    """An activation after rounding to 8 bits; the new nodes stand in front of the first that takes it."""
    dtype = value.dtype
    assert dtype is not None
    scale = representable(np.array([largest / number.largest], np.float32), dtype)[0]
    parameters = [builder.tensor(scale, dtype), builder.tensor(0, number.dtype)]
    builder.before = node
    stored = builder.add("QuantizeLinear", [value, *parameters], number.dtype, value.shape)
    return builder.add("DequantizeLinear", [stored, *parameters], dtype, value.shape)


def _stored(builder: Builder, value: ir.Value, node: ir.Node, axis: int, number: NumberFormat) -> ir.Value:
    """Weights in 8 bits, behind a ``DequantizeLinear``."""
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
    """Share of all weights of products that the named layers have."""
    layers, chosen = find_layers(graph), set(names)
    sizes = {layer.name: math.prod(graph.initializers[layer.weight].shape.numpy()) for layer in layers}
    return float(sum(size for name, size in sizes.items() if name in chosen) / max(sum(sizes.values()), 1))
