"""Give a ``Reshape`` a constant shape in terms of its own input, so that it measures no other tensor."""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder


def reshape_by_own_lengths(graph: ir.Graph) -> int:
    """Replace the computed shape of a ``Reshape`` by a constant, where that has the same meaning.

    torch's tracer knows lengths by name and measures each on the tensor where it first occurred. The batch size of the
    prompt's embeddings, for example, may be measured on the latents, which have as many rows. The reshaped embeddings
    would then depend on the latents, and could not be computed once for each request.

    Cases:
        1. The output's dimensions are known: a number stands for itself; a length with the name that the input has on
           the same axis becomes 0, and one other length becomes -1. The specification of ONNX's ``Reshape`` copies the
           input's length for a 0, and infers the one for -1 from the number of elements.
        2. Two or more lengths would be -1, an output dimension is 0 itself, or the shape of the input or output is
           unknown: the node stays.
        3. The shape is a constant already: the node stays.

    Args:
        graph: Changed in place. Nodes that computed nothing but such a shape stay, unused.

    Returns:
        The number of nodes that have a constant shape now.
    """
    builder, count = Builder(graph, "reshape"), 0
    for node in graph:
        # Case 3.
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        # Cases 1 and 2.
        if (lengths := _own_lengths(node)) is not None:
            node.replace_input_with(1, builder.constant(lengths))
            node.attributes.pop("allowzero", None)  # it would turn 0 from "copied" into a length of zero
            count += 1
    return count


def _own_lengths(node: ir.Node) -> list[int] | None:
    """Return the constant shape of case 1; ``None`` in case 2."""
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
