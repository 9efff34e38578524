"""A graph of half precision in fp32: to see its range, or to compute on a processor what a GPU would compute."""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Element types of half precision."""

_FLOAT = ir.DataType.FLOAT


def widen(graph: ir.Graph, *, rounded: bool = False, weights: bool = True) -> list[str]:
    """Turn every fp16 or bf16 value of a graph into fp32, under its name.

    ONNX Runtime on a processor computes in fp32 and rounds where it suits it, so a graph that overflows on a GPU may
    look sound there. With ``rounded`` every value is rounded to what it was, and overflows to infinity as it would.

    Cases:
        1. Inputs and outputs become fp32; with ``rounded`` they pass through a ``Cast`` there and back.
        2. Constants become fp32 with the same numbers; those of attributes too.
        3. A ``Cast`` to half precision becomes one to fp32.
        4. With ``rounded`` each output of a node passes through a ``Cast`` to half precision and back. Sums inside an
           operator stay fp32, as in the matrix units of GPUs.

    Args:
        graph: Changed in place. Its nodes have no subgraphs.
        weights: Turn constants into fp32. If not, each passes through a ``Cast`` before the first node that takes it: a
            graph that is run once then needs not all of its weights in fp32 at a time.

    Returns:
        Names of the values that were of half precision, constants left out.
    """
    builder, nodes = Builder(graph, "widen"), list(graph)
    places = {node: place for place, node in enumerate(nodes)}
    found: list[str] = []

    def convert(value: ir.Value, following: ir.Node | None) -> None:
        if (half := value.dtype) not in HALVES:
            return
        found.append(str(value.name))
        value.dtype = _FLOAT
        if rounded:
            builder.before = following
            _round_trip(builder, value, half)

    for value in graph.initializers.values():
        if value.dtype in HALVES and value.const_value is not None:
            if weights:
                value.const_value, value.dtype = _widened(value.const_value), _FLOAT
            elif users := [(use.node, use.idx) for use in value.uses()]:
                builder.before = min((node for node, _ in users), key=places.__getitem__)
                wide = builder.add("Cast", [value], _FLOAT, value.shape, to=_FLOAT.value)
                for node, place in users:
                    node.replace_input_with(place, wide)
    for value in list(graph.inputs):
        convert(value, nodes[0] if nodes else None)
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
                node.attributes.add(ir.AttrTensor(attribute.name, _widened(attribute.as_tensor())))
            elif attribute.name in ("to", "dtype", "output_dtype") and ir.DataType(attribute.as_int()) in HALVES:
                node.attributes.add(ir.AttrInt64(attribute.name, _FLOAT.value))
        for value in node.outputs:
            convert(value, following)
    return found


def round_values(graph: ir.Graph, half: ir.DataType, *, keep: str) -> None:
    """Round what an fp32 graph computes, and its weights, as an engine does that lowers it to half precision by itself.

    Args:
        graph: Changed in place. Its nodes have no subgraphs.
        half: fp16 or bf16.
        keep: Values whose names begin with this stay as they are.
    """
    builder, nodes = Builder(graph, "round"), list(graph)
    if not nodes:
        return
    builder.before = nodes[0]
    for value in list(graph.initializers.values()):
        if value.dtype == _FLOAT and not str(value.name).startswith((keep, "round")):
            _round_trip(builder, value, half)
    for node, builder.before in zip(nodes, [*nodes[1:], None], strict=True):
        for value in node.outputs:
            if value.dtype == _FLOAT and value not in graph.outputs and not str(value.name).startswith(keep):
                _round_trip(builder, value, half)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same numbers in fp32, made when they are asked for."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype("float32")),
        dtype=_FLOAT,
        shape=ir.Shape(tensor.shape),
        name=tensor.name,
    )


def _round_trip(builder: Builder, value: ir.Value, half: ir.DataType) -> None:
    """Let everyone who takes ``value`` take it rounded."""
    users = [(use.node, use.idx) for use in value.uses()]
    places = [place for place, output in enumerate(builder.graph.outputs) if output is value]
    back = builder.add(
        "Cast", [builder.add("Cast", [value], half, value.shape, to=half.value)], _FLOAT, value.shape, to=_FLOAT.value
    )
    for node, place in users:
        node.replace_input_with(place, back)
    for place in places:
        value.name, back.name = f"{value.name}_exact", value.name
        builder.graph.outputs[place] = back
