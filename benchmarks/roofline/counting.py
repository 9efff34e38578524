"""How far a measured time is from what the machine allows: the roofline model.

The operations of a graph are counted for the shapes that were run, and so is the traffic that it cannot do without.
Together with the machine's own ceilings (:mod:`latentrt.benchmarks.roofline.ceilings`) they give the most operations a
second that the graph could
reach: the lesser of the arithmetic's ceiling, and of operations a byte times the memory's (Williams, Waterman and
Patterson 2009, "Roofline: an insightful visual performance model for multicore architectures").

What is counted as one floating-point operation, and how many an operator takes, stands in the tables below. Products
of matrices and convolutions are counted as the textbook algorithm does them, two for a multiplication with its
addition; an engine that convolves by Winograd's algorithm does fewer, and may so come out above 100 percent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import NodeProto, helper

from latentrt.engines import TensorSpec
from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.denoising.schedule_stage import TIMESTEPS_AT_ONCE

from .graph_shapes import Tensor, read_graph, resolve

COMPUTED_IN: Mapping[str, str] = {"fp16": "fp32", "int8-weights": "fp32"}
"""Precisions of a form whose products a CPU computes in another: ONNX Runtime and OpenVINO widen half precision, and
weights that alone are quantised."""

# Floating-point operations for each element of the output. One for each addition, multiplication, division, comparison
# and rounding; one too for each root, exponential, sine and so on, which take a processor ten or more: as XLA counts
# (HloCostAnalysis). An operator that is made of several steps counts as many as its definition in ONNX has, so that it
# counts the same written as one or decomposed. A bias of a product is not counted: a sum of k products and a bias takes
# k multiplications and k additions, which is what is counted for the product alone.
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

# The same for each element of the first input.
_PER_INPUT: Mapping[str, int] = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "GlobalAveragePool"), 1),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"), 2),
    # Mean 1, difference 1, variance 2 (square and sum), quotient 1, scale 1, bias 1.
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "InstanceNormalization"), 7),
    "RMSNormalization": 4,
    "DynamicQuantizeLinear": 5,  # largest, smallest, and quantising
    "BatchNormalization": 2,  # its statistics are constants: one product, one sum
}

# These move, select or convert elements and compute none; tests and indices are not floating-point operations.
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


@dataclass(frozen=True)
class Work:
    """What running a graph takes, whoever runs it.

    Attributes:
        flops: Floating-point operations; those on 8-bit integers in quantised products among them. Arithmetic on shapes
            and indices is not counted, nor is what follows from constants alone, which an engine computes when it
            loads the graph.
        bytes: Traffic that no engine can avoid: every input, every weight and every output once, in the types that the
            graph has them in. Values between nodes are taken to stay in caches. Of a table from which rows are
            gathered, only as many rows as are asked for.
        by_operator: Floating-point operations by operator, the most first; an operator without any is left out.
        products: Those of products of matrices and convolutions, the two products within an Attention among them.
    """

    flops: int
    bytes: int
    by_operator: Mapping[str, int] = field(repr=False)
    products: int

    def times(self, calls: int) -> Work:
        """The work of that many equal calls."""
        by_operator = {name: calls * flops for name, flops in self.by_operator.items()}
        return Work(calls * self.flops, calls * self.bytes, by_operator, calls * self.products)

    def __add__(self, other: Work) -> Work:
        by_operator = Counter(self.by_operator) + Counter(other.by_operator)
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            dict(by_operator.most_common()),
            self.products + other.products,
        )


class StageWork(NamedTuple):
    """A stage of a request.

    Attributes:
        work: Of all its calls in one sample of its time: both texts of the text encoder, one step of the loop.
        calls: Calls of the engine in that sample.
        precision: What the graph of that stage is in: a form of reduced precision may keep some in a higher one.
    """

    work: Work
    calls: int
    precision: str


@dataclass(frozen=True)
class RooflineRow:
    """Where a stage lies under the roofline.

    Attributes:
        stage: Its name.
        flops: Floating-point operations.
        bytes: Bytes that have to be moved.
        seconds: What it took.
        calls: Calls of the engine in that.
        achieved_flops: Operations a second.
        ceiling_flops: Most operations a second that the machine allows for as many operations a byte.
        percent: The former in percent of the latter. Convolutions by Winograd's algorithm can exceed 100, as can
            a graph that says int8 and keeps half its products in fp32.
        bound: What the ceiling is made of: ``"compute"`` or ``"memory"``.
        precision: Whose ceiling it is.
    """

    stage: str
    flops: int
    bytes: int
    seconds: float
    calls: int
    achieved_flops: float
    ceiling_flops: float
    percent: float
    bound: str
    precision: str


def count(path: Path, shapes: Mapping[str, Sequence[int]]) -> Work:
    """Count the operations and the least traffic of one call of a graph.

    Args:
        path: An ONNX graph. Weights in other files are not read.
        shapes: Shape of every input of the graph, by name.

    Raises:
        InvalidRequestError: if the shapes do not fit the graph's inputs.
        BundleError: if it is not a graph, or has an operator or a shape that cannot be counted; nothing is passed over.
    """
    return count_model(read_graph(path), shapes, str(path))


def count_model(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], label: str = "the graph") -> Work:
    """:func:`count` for a graph that was read already; ``label`` is what messages call it."""
    tensors = resolve(model, shapes, label)
    flops: Counter[str] = Counter()
    products = 0
    for node in model.graph.node:
        total, of_products = _operations(node, tensors, f"{label}: {node.op_type} {node.name or node.output[0]!r}")
        flops[node.op_type] += total
        products += of_products
    by_operator = {name: total for name, total in flops.most_common() if total}
    return Work(sum(flops.values()), _traffic(model.graph, tensors), by_operator, products)


def bundle_work(
    bundle: Bundle,
    form: str,
    *,
    images: int,
    guided: bool,
    width: int,
    height: int,
    steps: int,
    registers: int = 1,
) -> dict[str, StageWork]:
    """Count the stages of a request as :class:`~latentrt.runtime.Pipeline` runs them.

    Args:
        bundle: The bundle.
        form: Which graphs of it, such as ``"opset20-fp32"``.
        images: Pictures of the request.
        guided: Whether the negative prompt is computed too.
        width: In pixels.
        height: In pixels.
        steps: Calls of the denoiser; of a sampler of second order that is more than the steps asked for.
        registers: Registers of the sampler's plan, which concern the last few operations of a fused step only.

    Returns:
        By stage: ``text_encoder`` (one call a text), ``prompt`` (likewise), ``schedule`` (all timesteps of the request,
        in one call or a few), ``step`` (one), ``plain_step`` (one, of the whole denoiser), ``vae_decoder``. The
        denoiser's stages are left out where the bundle has none, and the plain step where there is no whole denoiser in
        that form.

    Raises:
        BundleError: if the bundle has no such graphs, or one cannot be counted.
    """
    factor = bundle.manifest.latent.vae_scale_factor
    texts, rows = (2, 2 * images) if guided else (1, images)
    lengths = {"latent_height": height // factor, "latent_width": width // factor}
    lengths |= {"registers": registers, "terms": registers + 2}
    tokens = max(tokenizer.max_length for tokenizer in bundle.manifest.tokenizers.values())
    lengths |= {"text_length": tokens, "embeddings": 1}  # a prompt of one chunk, and no word of its own

    def stage(component: str, *batches: int) -> StageWork:
        """The work of one call for each number of rows in ``batches``."""
        graph = bundle.graph(component, form)
        path = bundle.graph_path(component, form)
        model = read_graph(path)
        work = Work(0, 0, {}, 0)
        for batch, calls in Counter(batches).items():
            shapes = input_shapes(graph.inputs, {**lengths, "batch": batch, "rows": rows}, component)
            work += count_model(model, shapes, str(path)).times(calls)
        return StageWork(work, len(batches), graph.precision)

    there = {name for name, component in bundle.manifest.components.items() if form in component.graphs}
    found = {"text_encoder": stage("text_encoder", *[1] * texts)}
    if "unet_prompt" in there:
        found["prompt"] = stage("unet_prompt", *[1] * texts)
    if "unet_schedule" in there:
        vectors = len(bundle.graph("unet_schedule", form).inputs) > 1  # of a text, so that every text has its own rows
        total = steps * texts if vectors else steps
        parts = [min(TIMESTEPS_AT_ONCE, total - first) for first in range(0, total, TIMESTEPS_AT_ONCE)]
        found["schedule"] = stage("unet_schedule", *parts)
    if "unet_step" in there:
        found["step"] = stage("unet_step", images)
    if "unet" in there or "unet_step" not in there:
        found["plain_step"] = stage("unet", rows)
    found["vae_decoder"] = stage("vae_decoder", images)
    return found


def input_shapes(specs: Sequence[TensorSpec], lengths: Mapping[str, int], label: str) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs with lengths in place of their symbols.

    Raises:
        BundleError: if a symbol is not among ``lengths``; ``label`` is what the message calls the graph.
    """
    for spec in specs:
        for each in spec.shape:
            if isinstance(each, str) and each not in lengths:
                raise BundleError(f"{label}: the input {spec.name!r} has a length {each!r}, which no request decides")
    return {spec.name: tuple(lengths[each] if isinstance(each, str) else each for each in spec.shape) for spec in specs}


def place(
    work: Work, seconds: float, ceilings: Mapping[str, Any], precision: str, *, stage: str = "", calls: int = 1
) -> RooflineRow:
    """Put a measured time under the roofline.

    Args:
        work: What was done in that time.
        seconds: The time.
        ceilings: As :func:`latentrt.benchmarks.roofline.ceilings.measure_ceilings` gives them.
        precision: What products were computed in; see :data:`COMPUTED_IN` for what stands for another.
        stage: Name of what was timed.
        calls: Calls of the engine in that time.

    Raises:
        InvalidRequestError: if there is no ceiling for the precision, or no work or time.
    """
    computed_in = COMPUTED_IN.get(precision, precision)
    matmul = ceilings["matmul"].get(computed_in, {"unavailable": f"no ceiling was measured for {computed_in}"})
    if "unavailable" in matmul:
        raise InvalidRequestError(f"{stage or 'the work'} has no place under the roofline: {matmul['unavailable']}")
    if not (seconds > 0 and math.isfinite(seconds) and work.flops > 0 and work.bytes > 0):
        raise InvalidRequestError(
            f"{stage or 'the work'} has no place under the roofline: {work.flops} operations and {work.bytes} bytes in "
            f"{seconds} seconds"
        )
    peak, from_memory = matmul["flops_per_second"], work.flops / work.bytes * ceilings["copy"]["bytes_per_second"]
    ceiling, achieved = min(peak, from_memory), work.flops / seconds
    return RooflineRow(
        stage=stage,
        flops=work.flops,
        bytes=work.bytes,
        seconds=seconds,
        calls=calls,
        achieved_flops=achieved,
        ceiling_flops=ceiling,
        percent=100 * achieved / ceiling,
        bound="compute" if ceiling == peak else "memory",
        precision=computed_in,
    )


def _traffic(graph: onnx.GraphProto, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of inputs, weights and outputs, each once."""
    gathered: Counter[str] = Counter()
    whole = {each.name for each in graph.output}
    for node in graph.node:
        rows_of = node.input[0] if node.op_type == "Gather" and not node.domain else None
        whole.update(name for name in node.input if name != rows_of)
        if rows_of:
            gathered[rows_of] += tensors[node.output[0]].nbytes
    weights = {each.name for each in graph.initializer}
    inputs = {each.name for each in graph.input} - weights
    weights |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    read = sum(
        tensors[name].nbytes if name in whole else min(tensors[name].nbytes, gathered[name])
        for name in inputs | weights
    )
    return read + sum(tensors[each.name].nbytes for each in graph.output)


def _operations(node: NodeProto, tensors: Mapping[str, Tensor], where: str) -> tuple[int, int]:
    """Floating-point operations of a node, and those of its products."""
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
    # Shapes and indices are integers; what makes integers of floating-point numbers is arithmetic all the same.
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
    """As one nest of loops over all letters: the product of the factors, and its addition where a letter is summed."""
    equation = _attribute(node, "equation", b"").decode().replace(" ", "")
    if "." in equation:
        raise BundleError(f"{where} leaves dimensions out of its equation {equation!r}, and cannot be counted")
    given, arrow, result = equation.partition("->")
    lengths: dict[str, int] = {}
    for term, tensor in zip(given.split(","), inputs, strict=True):
        for letter, length in zip(term, tensor.shape, strict=True):
            lengths[letter] = max(lengths.get(letter, 1), length)
    if not arrow:  # what occurs once is kept
        result = "".join(letter for letter in lengths if given.count(letter) == 1)
    total = (len(inputs) - 1 + (set(result) != set(lengths))) * math.prod(lengths.values())
    return total, total if len(inputs) > 1 else 0
