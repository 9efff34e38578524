"""Find the graph inputs that each value of a graph depends on; an analysis, which changes nothing."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

Dependencies = Mapping[ir.Value, frozenset[str]]
"""Names of graph inputs, by value."""


def dependencies(graph: ir.Graph) -> Dependencies:
    """Map every input and every node's output to the names of the graph inputs that reach it.

    Initializers, and nodes that only constants reach, depend on no input.

    Cases:
        1. A graph input depends on itself.
        2. An output of a node depends on all inputs that the node's inputs depend on.
        3. A node with subgraphs (``If``, ``Loop``) depends also on the outer values that its subgraphs capture.

    Args:
        graph: Its nodes must be in topological order, as in every serialised graph.
    """
    # Case 1.
    found: dict[ir.Value, frozenset[str]] = {value: frozenset({str(value.name)}) for value in graph.inputs}
    for node in graph:
        # Cases 2 and 3: a value that is not found is an initializer, a constant, or local to a subgraph.
        used = [value for value in node.inputs if value is not None] + captures(node)
        names = frozenset[str]().union(*(found.get(value, frozenset()) for value in used))
        for output in node.outputs:
            found[output] = names
    return found


def captures(node: ir.Node) -> list[ir.Value]:
    """List the values that the subgraphs of a node (``If``, ``Loop``) use: outer ones, and those local to them."""
    return [
        value
        for attribute in node.attributes.values()
        for subgraph in _subgraphs(attribute)
        for inner in subgraph.all_nodes()
        for value in inner.inputs
        if value is not None
    ]


def _subgraphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    if attribute.type == ir.AttributeType.GRAPHS:
        return list(attribute.as_graphs())
    return []
