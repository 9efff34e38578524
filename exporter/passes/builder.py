"""Add nodes, constants and inputs to an existing graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike


class Builder:
    """Adds nodes to a graph, each with one output under a name that the graph does not have yet.

    A new value is called ``<prefix>_<operator>_<number>``.

    Args:
        graph: Gains nodes, constants and inputs.
        prefix: First part of the names of new values.

    Attributes:
        graph: The same graph.
        before: The node in front of which new nodes are inserted; ``None`` appends them to the graph.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.before: ir.Node | None = None
        self._prefix = prefix
        self._count = 0
        self._taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
        self._taken |= {value.name for node in graph for value in node.outputs}

    def insert(self, node: ir.Node) -> None:
        """Insert a node that the caller has made."""
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
        """Insert a node with one output, and return that output.

        Args:
            operator: Operator of ONNX's default domain.
            inputs: Its inputs, in order.
            dtype: Element type of the output.
            shape: Dimensions of the output; ``None`` leaves them unknown.
            **attributes: Integer attributes of the node.
        """
        node = ir.node(operator, inputs, attributes=attributes)
        self.insert(node)
        output = node.outputs[0]
        output.name, output.dtype = self._new_name(operator), dtype
        output.shape = None if shape is None else ir.Shape(shape)
        return output

    def constant(self, values: ArrayLike, dtype: type[np.generic] = np.int64) -> ir.Value:
        """Add a small constant of an element type that numpy has."""
        array = np.asarray(values, dtype)
        value = ir.val(self._new_name("constant"), const_value=ir.tensor(array))
        self.graph.register_initializer(value)
        return value

    def tensor(self, values: ArrayLike, dtype: ir.DataType) -> ir.Value:
        """Add a constant of any element type that ONNX has."""
        array = np.asarray(values).astype(dtype.numpy())
        value = ir.val(self._new_name("constant"), const_value=ir.Tensor(array, dtype=dtype))
        self.graph.register_initializer(value)
        return value

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
        """Declare another input of the graph, behind those that it has."""
        value = ir.val(name, dtype=dtype, shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def cast_for_users(self, value: ir.Value, *dtypes: ir.DataType, suffix: str) -> None:
        """Let everything that uses a value use it after one ``Cast`` to each of ``dtypes``, in this order.

        Args:
            value: Its users are those of this moment; nodes that are added later use ``value`` itself.
            *dtypes: Element types.
            suffix: If ``value`` is a graph output, the last cast takes its name and place, and ``value`` gets this
                behind its name.
        """
        users = [(use.node, use.idx) for use in value.uses()]
        outputs = [index for index, output in enumerate(self.graph.outputs) if output is value]
        cast = value
        for dtype in dtypes:
            cast = self.add("Cast", [cast], dtype, value.shape, to=dtype.value)
        for node, index in users:
            node.replace_input_with(index, cast)
        for index in outputs:
            value.name, cast.name = f"{value.name}{suffix}", value.name
            self.graph.outputs[index] = cast

    def _new_name(self, kind: str) -> str:
        while True:
            self._count += 1
            name = f"{self._prefix}_{kind.lower()}_{self._count}"
            if name not in self._taken:
                return name
