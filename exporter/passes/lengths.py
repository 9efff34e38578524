"""Measure lengths on inputs that the graph needs anyway, and drop inputs of which nothing else is used."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from .guidance import dimensions_read


def measure_elsewhere(graph: ir.Graph, *, among: Collection[str]) -> list[str]:
    """Drop inputs that only ``Shape`` nodes use, where other inputs have dimensions of the same names.

    torch measures the length of a prompt on the prompt's own embeddings, so the step of a denoiser would take these
    embeddings for nothing but their length. What the prompt stage computed from them is an input of the step too, and
    has the same length: a name stands for one length throughout a graph.

    Cases:
        1. Every use of an input is a ``Shape`` that reads a single dimension, known by name, and an input in ``among``
           has a dimension of that name: the node reads that one, and the input is removed.
        2. An input in ``among``, an input that is also an output of the graph, an input with any other use, and an
           input that nothing uses stay.

    Args:
        graph: Changed in place.
        among: Names of the inputs to measure on.

    Returns:
        Names of the removed inputs.
    """
    others = [value for value in graph.inputs if value.name in among]
    removed = []
    for value in list(graph.inputs):
        # Case 2. All uses are looked at before any node changes, so that an input that stays is measured as before.
        nodes = [use.node for use in value.uses()]
        if value in others or value in graph.outputs or any(node.op_type != "Shape" for node in nodes):
            continue
        places = [_same_length(node, value, others) for node in nodes]
        if not nodes or any(place is None for place in places):
            continue

        # Case 1.
        for node, place in zip(nodes, places, strict=True):
            assert place is not None
            other, axis = place
            node.replace_input_with(0, other)
            node.attributes.add(ir.AttrInt64("start", axis))
            node.attributes.add(ir.AttrInt64("end", axis + 1))
        graph.inputs.remove(value)
        removed.append(str(value.name))
    return removed


def _same_length(node: ir.Node, value: ir.Value, others: Sequence[ir.Value]) -> tuple[ir.Value, int] | None:
    """Find one of ``others``, and its axis, whose length has the name of the one that ``node`` reads of ``value``."""
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
