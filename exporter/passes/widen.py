"""Turn a half-precision graph into fp32: to see its range, or to compute on a CPU what a GPU would compute."""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Element types of half precision."""

_FLOAT = ir.DataType.FLOAT


def widen(graph: ir.Graph, *, rounded: bool = False, weights: bool = True) -> list[str]:
    """Turn every fp16 or bf16 value of a graph into fp32, under its name.

    On a CPU, ONNX Runtime computes half precision in fp32 and leaves out roundings where it likes, so a graph that
    overflows on a GPU may look sound there. With ``rounded`` every value is rounded to the type that it had, and
    overflows to infinity as it does in half precision.

    Cases:
        1. An initializer of half precision becomes fp32 with the same numbers. With ``weights=False`` it stays, and
           its users use its ``Cast`` to fp32, which stands in front of the first of them.
        2. A half-precision input of the graph becomes fp32; with ``rounded`` its users use it after a ``Cast`` to half
           precision and back.
        3. An attribute that is a half-precision tensor becomes fp32, and one that names half precision as the type of
           an output names fp32. A ``Cast`` to half precision thereby becomes a ``Cast`` to fp32.
        4. A half-precision output of a node becomes fp32; with ``rounded`` its users use it after a ``Cast`` to half
           precision and back. Sums inside an operator stay fp32, as in the matrix units of GPUs.

    Args:
        graph: Changed in place. Its nodes have no subgraphs.
        rounded: Round every value as half precision does.
        weights: Turn initializers into fp32 at once. ``False`` saves memory in a graph that runs a single time, since
            not all weights are then in fp32 at the same time.

    Returns:
        Names of the inputs and outputs of nodes that were of half precision.
    """
    builder, nodes = Builder(graph, "widen"), list(graph)
    order = {node: index for index, node in enumerate(nodes)}
    found: list[str] = []

    def convert(value: ir.Value, following: ir.Node | None) -> None:
        if (half := value.dtype) not in HALVES:
            return
        found.append(str(value.name))
        value.dtype = _FLOAT
        if rounded:
            builder.before = following
            builder.cast_for_users(value, half, _FLOAT, suffix="_exact")

    # Case 1.
    for value in graph.initializers.values():
        if value.dtype in HALVES and value.const_value is not None:
            if weights:
                value.const_value, value.dtype = _widened(value.const_value), _FLOAT
            elif users := [(use.node, use.idx) for use in value.uses()]:
                builder.before = min((node for node, _ in users), key=order.__getitem__)
                wide = builder.add("Cast", [value], _FLOAT, value.shape, to=_FLOAT.value)
                for node, index in users:
                    node.replace_input_with(index, wide)

    # Case 2.
    for value in list(graph.inputs):
        convert(value, nodes[0] if nodes else None)
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        # Case 3.
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
                node.attributes.add(ir.AttrTensor(attribute.name, _widened(attribute.as_tensor())))
            elif attribute.name in ("to", "dtype", "output_dtype") and ir.DataType(attribute.as_int()) in HALVES:
                node.attributes.add(ir.AttrInt64(attribute.name, _FLOAT.value))
        # Case 4.
        for value in node.outputs:
            convert(value, following)
    return found


def round_values(graph: ir.Graph, half: ir.DataType, *, keep: str) -> None:
    """Round the weights and values of an fp32 graph, as an engine does that lowers fp32 to half precision by itself.

    Cases:
        1. The users of an fp32 initializer use it after a ``Cast`` to ``half`` and back.
        2. The users of an fp32 output of a node do too, unless it is an output of the graph.
        3. Values whose names begin with ``keep``, and values of other types, stay.

    Args:
        graph: Changed in place. Its nodes have no subgraphs.
        half: Element type to round to, fp16 or bf16.
        keep: Prefix of the names of values that the engine leaves in fp32.
    """
    builder, nodes = Builder(graph, "round"), list(graph)
    if not nodes:
        return
    # Case 1.
    builder.before = nodes[0]
    for value in list(graph.initializers.values()):
        if value.dtype == _FLOAT and not str(value.name).startswith(keep):
            builder.cast_for_users(value, half, _FLOAT, suffix="_exact")
    # Case 2.
    for node, builder.before in zip(nodes, [*nodes[1:], None], strict=True):
        for value in node.outputs:
            if value.dtype == _FLOAT and value not in graph.outputs and not str(value.name).startswith(keep):
                builder.cast_for_users(value, half, _FLOAT, suffix="_exact")


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return the same numbers in fp32; the conversion runs when they are read."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype("float32")),
        dtype=_FLOAT,
        shape=ir.Shape(tensor.shape),
        name=tensor.name,
    )
