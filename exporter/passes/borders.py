"""Give a bf16 graph inputs and outputs of fp32: numpy has no bf16, so a caller without PyTorch could not feed it."""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder

_FLOAT, _BF16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


def float_borders(graph: ir.Graph) -> bool:
    """Turn bf16 inputs and outputs into fp32 ones of the same name.

    Nothing inside the graph changes: every bf16 number is also an fp32 number, so an output keeps its value, and an
    input is rounded to bf16 where the graph takes it.

    Cases:
        1. A bf16 input becomes fp32, and everything that used it uses its ``Cast`` to bf16.
        2. A bf16 output is renamed to ``<name>_bf16``, and its ``Cast`` to fp32 takes its name and place.
        3. Inputs and outputs of any other type stay.

    Args:
        graph: Changed in place.

    Returns:
        Whether an input or output changed.
    """
    builder, changed = Builder(graph, "border"), False

    # Case 1: casts of inputs stand in front of all nodes. The users are listed first, since the cast is one itself.
    builder.before = next(iter(graph), None)
    for value in graph.inputs:
        if value.dtype == _BF16:
            users = [(use.node, use.idx) for use in value.uses()]
            value.dtype, changed = _FLOAT, True
            inside = builder.add("Cast", [value], _BF16, value.shape, to=_BF16.value)
            for node, index in users:
                node.replace_input_with(index, inside)

    # Case 2: casts of outputs stand behind all nodes.
    builder.before = None
    for index, value in enumerate(graph.outputs):
        if value.dtype == _BF16:
            outside = builder.add("Cast", [value], _FLOAT, value.shape, to=_FLOAT.value)
            name, changed = value.name, True
            value.name, outside.name = f"{name}_bf16", name
            graph.outputs[index] = outside
    return changed
