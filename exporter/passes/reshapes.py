"""Say what a tensor is reshaped to in terms of the tensor itself, so that no other one is measured for it."""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder


def reshape_by_own_lengths(graph: ir.Graph) -> int:
    """Replace the computed shape of a ``Reshape`` by a constant, where that says the same.

    The tracer knows lengths by name and measures each where it met it first: the rows of a text, say, on the latents,
    which have as many. What is reshaped so would depend on the latents, and could not be computed once a request.

    Cases:
        1. A length that is known is itself; one that has the name of the input's at the same place is 0 (ONNX: "copied
           from the input tensor"); one other may be -1 ("inferred from the remaining dimensions").
        2. With two or more others, or an input or output whose dimensions are not known, the node stays.

    Args:
        graph: Changed in place; what only computed such shapes is still there, unused.

    Returns:
        The number of nodes that have a constant shape now.
    """
    builder, count = Builder(graph, "reshape"), 0
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        if (lengths := _own_lengths(node)) is not None:
            node.replace_input_with(1, builder.constant(lengths))
            node.attributes.pop("allowzero", None)  # with it a 0 would be a length; no length here is
            count += 1
    return count


def _own_lengths(node: ir.Node) -> list[int] | None:
    """The shape of case 1."""
    data, result = node.inputs[0], node.outputs[0]
    if data is None or data.shape is None or result.shape is None:
        return None
    lengths = []
    for axis, length in enumerate(result.shape):
        if isinstance(length, int):
            lengths.append(length)
        elif axis < len(data.shape) and length.value is not None and data.shape[axis] == length:
            lengths.append(0)
        else:
            lengths.append(-1)
    return lengths if lengths.count(-1) <= 1 and 0 not in result.shape.dims else None
