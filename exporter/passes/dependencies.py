"""Which graph inputs each value of a graph depends on."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

Dependencies = Mapping[ir.Value, frozenset[str]]


def dependencies(graph: ir.Graph) -> Dependencies:
    """Names of the graph inputs that each value depends on; initializers and constants depend on none.

    Cases:
        1. A graph input depends on itself.
        2. An output of a node depends on all that the node's inputs depend on.
        3. A node with subgraphs (``If``, ``Loop``) also depends on what its subgraphs capture from outside.

    Args:
        graph: Its nodes must be in topological order, as every serialised graph's are.
    """
    found: dict[ir.Value, frozenset[str]] = {value: frozenset({str(value.name)}) for value in graph.inputs}
    for node in graph:
        used = [value for value in node.inputs if value is not None] + captures(node)
        names = frozenset[str]().union(*(found.get(value, frozenset()) for value in used))
        for output in node.outputs:
            found[output] = names
    return found


def captures(node: ir.Node) -> list[ir.Value]:
    """Values that the subgraphs of a node (``If``, ``Loop``) use, those of their own among them."""
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
