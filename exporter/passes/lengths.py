"""Measure lengths on inputs that are there anyway, so that one which is only measured need not be."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from .guidance import dimensions_read


def measure_elsewhere(graph: ir.Graph, *, among: Collection[str]) -> list[str]:
    """Drop inputs of which nothing but lengths is used, where other inputs have the same lengths.

    A text of variable length leaves its length to the step of a denoiser, and torch measures it on the text itself;
    what was computed of the text ahead is as long.

    Cases:
        1. An input that only ``Shape`` nodes read, each of them one dimension, and each of these the same, by its
           symbol, as a dimension of an input in ``among``: they read that one, and the input goes.
        2. Any other input stays.

    Args:
        graph: Changed in place.
        among: Inputs to measure on.

    Returns:
        Names of the inputs that are gone.
    """
    others = [value for value in graph.inputs if value.name in among]
    gone = []
    for value in list(graph.inputs):
        nodes = [use.node for use in value.uses()]
        if value in others or value in graph.outputs or any(node.op_type != "Shape" for node in nodes):
            continue
        places = [_place(node, value, others) for node in nodes]
        if not nodes or any(place is None for place in places):
            continue
        for node, place in zip(nodes, places, strict=True):
            assert place is not None
            other, axis = place
            node.replace_input_with(0, other)
            node.attributes.add(ir.AttrInt64("start", axis))
            node.attributes.add(ir.AttrInt64("end", axis + 1))
        graph.inputs.remove(value)
        gone.append(str(value.name))
    return gone


def _place(node: ir.Node, value: ir.Value, others: Sequence[ir.Value]) -> tuple[ir.Value, int] | None:
    """An input and a dimension of it that is as long as the one that ``node`` reads of ``value``."""
    if value.shape is None:
        return None
    first, last = dimensions_read(node, len(value.shape))
    wanted = value.shape[first]
    if last != first + 1 or not isinstance(wanted, ir.SymbolicDim) or wanted.value is None:
        return None
    for other in others:
        for axis, length in enumerate(other.shape or ()):
            if isinstance(length, ir.SymbolicDim) and length.value == wanted.value:
                return other, axis
    return None
