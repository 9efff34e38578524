"""Let a graph of bf16 take and give fp32: numpy has no bf16, and a caller without PyTorch could not call it."""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder

_FLOAT, _BF16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


def float_borders(graph: ir.Graph) -> bool:
    """Turn bf16 inputs and outputs into fp32.

    Cases:
        1. An input becomes fp32 and passes through a ``Cast`` to bf16.
        2. What computes an output is renamed, and the output is its ``Cast`` to fp32.

    Args:
        graph: Changed in place.

    Returns:
        Whether there was any.
    """
    builder, changed = Builder(graph, "border"), False
    builder.before = next(iter(graph), None)
    for value in graph.inputs:
        if value.dtype == _BF16:
            users = [(use.node, use.idx) for use in value.uses()]
            value.dtype, changed = _FLOAT, True
            inside = builder.add("Cast", [value], _BF16, value.shape, to=_BF16.value)
            for node, place in users:
                node.replace_input_with(place, inside)
    builder.before = None
    for place, value in enumerate(graph.outputs):
        if value.dtype == _BF16:
            outside = builder.add("Cast", [value], _FLOAT, value.shape, to=_FLOAT.value)
            name, changed = value.name, True
            value.name, outside.name = f"{name}_bf16", name
            graph.outputs[place] = outside
    return changed
