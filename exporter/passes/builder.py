"""Adding nodes to a graph that exists already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike


class Builder:
    """Adds nodes in front of one node of a graph, or behind all; names of values are new, by their number.

    Args:
        graph: Gains nodes and constants.
        prefix: What the names of new values begin with.

    Attributes:
        before: New nodes go in front of this one; ``None`` is the end of the graph.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.before: ir.Node | None = None
        self._prefix = prefix
        self._count = 0
        self._taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
        self._taken |= {value.name for node in graph for value in node.outputs}

    def insert(self, node: ir.Node) -> None:
        """Add a node that is made already."""
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)

    def add(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        shape: Sequence[int | str | ir.SymbolicDim] | None = None,
        **attributes: int,
    ) -> ir.Value:
        """Add a node with one output and return that."""
        node = ir.node(operator, inputs, attributes=attributes)
        self.insert(node)
        output = node.outputs[0]
        output.name, output.dtype = self._name(operator), dtype
        output.shape = None if shape is None else ir.Shape(shape)
        return output

    def constant(self, values: ArrayLike, dtype: type[np.generic] = np.int64) -> ir.Value:
        """A small constant."""
        array = np.asarray(values, dtype)
        value = ir.val(self._name("constant"), const_value=ir.tensor(array))
        self.graph.register_initializer(value)
        return value

    def tensor(self, values: ArrayLike, dtype: ir.DataType) -> ir.Value:
        """A constant of any element type that ONNX has."""
        array = np.asarray(values).astype(dtype.numpy())
        value = ir.val(self._name("constant"), const_value=ir.Tensor(array, dtype=dtype))
        self.graph.register_initializer(value)
        return value

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
        """Declare another input of the graph."""
        value = ir.val(name, dtype=dtype, shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def _name(self, what: str) -> str:
        while True:
            self._count += 1
            name = f"{self._prefix}_{what.lower()}_{self._count}"
            if name not in self._taken:
                return name
