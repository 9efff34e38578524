"""Floating-point operations of each ONNX operator.

The tables say what counts as one operation, and how many an operator takes. Products of matrices and convolutions count
as in the textbook algorithm, two operations for a multiplication with its addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnx import NodeProto, helper

from latentrt.engines.errors import BundleError

from .graph_shapes import Tensor

# Floating-point operations for each element of the output. Additions, multiplications, divisions, comparisons and
# roundings count one each; so do roots, exponentials, sines and the like, which take a processor ten or more, as XLA
# counts them (HloCostAnalysis). An operator of several steps counts as many as its definition in ONNX has, so that the
# count is the same for one operator and for its decomposition. A product's bias does not count: a sum of k products and
# a bias takes k multiplications and k additions, as many as the product alone counts.
_PER_OUTPUT: Mapping[str, int] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Sign"), 1),
    **dict.fromkeys(("Sqrt", "Reciprocal", "Exp", "Log", "Pow", "Erf", "Sin", "Cos", "Tan", "Tanh"), 1),
    **dict.fromkeys(("Floor", "Ceil", "Round", "Relu"), 1),
    **dict.fromkeys(("LeakyRelu", "Clip", "PRelu"), 2),
    "Sigmoid": 4,  # 1 / (1 + exp(-x))
    "Swish": 5,
    "HardSigmoid": 4,
    "HardSwish": 5,
    "Softplus": 3,
    "Mish": 5,
    "Elu": 4,
    "Gelu": 5,  # 0.5 * x * (1 + erf(x / sqrt(2))); its approximation by tanh is below
    "Softmax": 5,  # maximum, difference, exponential, sum, quotient
    "LogSoftmax": 6,
    "RotaryEmbedding": 3,
    "CumSum": 1,
    "QuantizeLinear": 3,  # quotient, rounding, zero point; saturation is part of the conversion
    "DequantizeLinear": 2,  # zero point, product
}

# Floating-point operations for each element of the first input.
_PER_INPUT: Mapping[str, int] = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "GlobalAveragePool"), 1),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"), 2),
    # Mean 1, difference 1, variance 2 (square and sum), quotient 1, scale 1, bias 1.
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "InstanceNormalization"), 7),
    "RMSNormalization": 4,
    "DynamicQuantizeLinear": 5,  # largest, smallest, and quantising
    "BatchNormalization": 2,  # its statistics are constants: one product, one sum
}

# Operators that move, select or convert elements; tests and indices are not floating-point operations.
_FREE = frozenset(
    (
        *("ArgMax", "ArgMin", "And", "BitShift", "Cast", "CastLike", "Concat", "Constant", "ConstantOfShape"),
        *("DepthToSpace", "Dropout", "Equal", "Expand", "EyeLike", "Flatten", "Gather", "GatherElements", "GatherND"),
        *("Greater", "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "NonZero"),
        *("OneHot", "Or", "Pad", "Range", "Reshape", "ScatterElements", "ScatterND", "Shape", "Size", "Slice"),
        *("SpaceToDepth", "Split", "Squeeze", "TensorScatter", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze"),
        *("Where", "Xor"),
    )
)


def operations(node: NodeProto, tensors: Mapping[str, Tensor], where: str) -> tuple[int, int]:
    """Floating-point operations of a node, and those of its products of matrices and convolutions.

    Args:
        node: The node.
        tensors: Type and shape of every value of the graph.
        where: The name of the node in messages.

    Raises:
        BundleError: if the node's operations are not known.
    """
    name = node.op_type
    inputs = [tensors.get(each) for each in node.input]
    output = next((tensors[each] for each in node.output if each), None)
    if output is None or output.constant:
        return 0, 0
    first = inputs[0] if inputs else None
    if node.domain not in ("", "ai.onnx"):
        raise BundleError(f"{where} is an operator of {node.domain}, whose operations are not known")
    if name in _PRODUCTS:
        total = 2 * _PRODUCTS[name](node, [each for each in inputs if each is not None], output)
        return total, total
    if name == "Attention":
        return _attention(node, [each for each in inputs[:3] if each is not None], tensors, output)
    if name == "Einsum":
        return _einsum(node, [each for each in inputs if each is not None], where)
    if name in _FREE:
        return 0, 0
    if name == "Resize":
        if (mode := _attribute(node, "mode", b"nearest")) != b"nearest":
            raise BundleError(f"{where} interpolates ({mode.decode()}), whose operations are not known")
        return 0, 0
    # Shapes and indices are integers; making integers of floating-point numbers is arithmetic all the same.
    if not output.floating and not (first is not None and first.floating):
        return 0, 0
    if name in ("Max", "Min", "Sum", "Mean"):
        return (len(inputs) - (name != "Mean")) * output.elements, 0
    if name in ("AveragePool", "MaxPool"):
        return math.prod(_attribute(node, "kernel_shape", ())) * output.elements, 0
    if name == "Gelu" and _attribute(node, "approximate", b"none") == b"tanh":
        return 9 * output.elements, 0  # 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    if name in _PER_OUTPUT:
        return _PER_OUTPUT[name] * output.elements, 0
    if name in _PER_INPUT and first is not None:
        return _PER_INPUT[name] * first.elements, 0
    raise BundleError(f"{where} is an operator whose operations are not known")


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _matmul(left: Tensor, output: Tensor) -> int:
    return output.elements * left.shape[-1]


def _gemm(node: NodeProto, inputs: Sequence[Tensor], output: Tensor) -> int:
    return output.elements * inputs[0].shape[0 if _attribute(node, "transA", 0) else 1]


def _conv(weight: Tensor, output: Tensor) -> int:
    """Weights are ``[out, in / groups, kernel...]``; products with padding count, as everywhere."""
    return output.elements * math.prod(weight.shape[1:])


def _conv_transpose(source: Tensor, weight: Tensor) -> int:
    """Weights are ``[in, out / groups, kernel...]``."""
    return source.elements * math.prod(weight.shape[1:])


# Multiplications with their additions, by operator.
_PRODUCTS: Mapping[str, Callable[[NodeProto, Sequence[Tensor], Tensor], int]] = {
    "MatMul": lambda _, inputs, output: _matmul(inputs[0], output),
    "MatMulInteger": lambda _, inputs, output: _matmul(inputs[0], output),
    "QLinearMatMul": lambda _, inputs, output: _matmul(inputs[0], output),
    "Gemm": _gemm,
    "Conv": lambda _, inputs, output: _conv(inputs[1], output),
    "ConvInteger": lambda _, inputs, output: _conv(inputs[1], output),
    "QLinearConv": lambda _, inputs, output: _conv(inputs[3], output),
    "ConvTranspose": lambda _, inputs, output: _conv_transpose(inputs[0], inputs[1]),
}


def _attention(
    node: NodeProto, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor], output: Tensor
) -> tuple[int, int]:
    """Scores, softmax and mean of the values: ``[batch, heads, length, size]``, or ``[batch, length, heads * size]``.

    Scores that a causal mask leaves out are counted, as they are where attention is decomposed.
    """
    query, key, value = inputs
    if len(query.shape) == 4:
        batch, heads, length, size = query.shape
        value_size, keys = value.shape[3], key.shape[2]
    else:
        batch, length, hidden = query.shape
        heads, keys = _attribute(node, "q_num_heads", 1), key.shape[1]
        size, value_size = hidden // heads, value.shape[2] // _attribute(node, "kv_num_heads", 1)
    if len(node.input) > 4 and node.input[4]:
        keys += tensors[node.input[4]].shape[2]  # those of earlier calls
    scores = batch * heads * length * keys
    products = 2 * scores * (size + value_size)
    masked = _attribute(node, "is_causal", 0) or (len(node.input) > 3 and bool(node.input[3]))
    # Each score is scaled, and a mask is added to it.
    return products + scores * (_PER_OUTPUT["Softmax"] + 1 + bool(masked)), products


def _einsum(node: NodeProto, inputs: Sequence[Tensor], where: str) -> tuple[int, int]:
    """Operations of one nest of loops over all letters: products of the factors, and sums over the other letters."""
    equation = _attribute(node, "equation", b"").decode().replace(" ", "")
    if "." in equation:
        raise BundleError(f"{where} leaves dimensions out of its equation {equation!r}, and cannot be counted")
    given, arrow, result = equation.partition("->")
    lengths: dict[str, int] = {}
    for term, tensor in zip(given.split(","), inputs, strict=True):
        for letter, length in zip(term, tensor.shape, strict=True):
            lengths[letter] = max(lengths.get(letter, 1), length)
    if not arrow:  # letters that occur once are kept
        result = "".join(letter for letter in lengths if given.count(letter) == 1)
    total = (len(inputs) - 1 + (set(result) != set(lengths))) * math.prod(lengths.values())
    return total, total if len(inputs) > 1 else 0
