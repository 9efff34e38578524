"""Run what both halves of classifier-free guidance have in common once instead of twice."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .dependencies import dependencies

BATCH, ROWS = "batch", "rows"
"""Names of the leading dimension: one row a sample, and one row a sample and half."""


def share_guidance(graph: ir.Graph, *, conditioned: Collection[str]) -> int:
    """Let everything that depends on latents and time alone run with one row a sample.

    Under guidance the unconditional and the conditional half see the same latents at the same time. Afterwards the
    inputs in ``conditioned`` have ``rows`` rows, a multiple of the ``batch`` rows of all others: all unconditional
    rows first, then all conditional ones. With as many rows as samples the graph computes what it did before.

    Cases:
        1. A node none of whose inputs depends on ``conditioned`` stays, and runs at ``batch``.
        2. A floating-point value that crosses to the other nodes and has one row a sample is repeated.
        3. Anything else that crosses (a shape, a value whose leading dimension is a product) is computed again from
           repeated values: repeating a shape would be wrong.

    Args:
        graph: The step graph; changed in place.
        conditioned: Inputs that differ between the halves.

    Returns:
        The number of nodes that run at ``batch`` now; 0 leaves the graph as it was.
    """
    found = dependencies(graph)
    names = set(conditioned)
    split = [node for node in graph if found[node.outputs[0]] & names]
    shared = [node for node in graph if found[node.outputs[0]] and not found[node.outputs[0]] & names]
    anchor = next((value for value in graph.inputs if value.name in names), None)
    sample = next((value for value in graph.inputs if value.name not in names), None)
    if not shared or not split or anchor is None or sample is None:
        return 0
    rewriter = _Rewriter(graph, anchor, sample, {v for v, deps in found.items() if deps and not deps & names})
    for node in split:
        rewriter.before = node
        for index, value in enumerate(node.inputs):
            if value in rewriter.shared:
                node.replace_input_with(index, rewriter.at_rows(value))
    for index, value in enumerate(graph.outputs):
        if value in rewriter.shared:
            rewriter.before = None
            graph.outputs[index] = rewriter.at_rows(value)
    # Runtimes reuse buffers between values whose dimensions have the same name, so the names must tell the truth.
    for value in (*(v for v in graph.inputs if v.name in names), *(v for node in split for v in node.outputs)):
        _rename_batch(value)
    return sum(1 for node in shared if any(output.uses() for output in node.outputs))


@dataclass
class _Rewriter:
    """Makes the version of a shared value that has one row a sample and half, once for each value."""

    graph: ir.Graph
    anchor: ir.Value
    sample: ir.Value
    shared: set[ir.Value]
    before: ir.Node | None = None
    made: dict[ir.Value, ir.Value] = field(default_factory=dict)
    repeats: dict[int, ir.Value] = field(default_factory=dict)
    ratio: ir.Value | None = None

    def at_rows(self, value: ir.Value) -> ir.Value:
        """``value`` itself if it does not depend on the latents, else its repeated or recomputed version."""
        if value not in self.shared:
            return value
        if value not in self.made:
            if _has_row_a_sample(value):
                rank = len(value.shape or ())
                tile = self._add("Tile", [value, self._repeats(rank)], value)
                self.made[value] = tile
            else:
                self._recompute(value)
        return self.made[value]

    def _recompute(self, value: ir.Value) -> None:
        producer = value.producer()
        assert producer is not None, "a graph input has one row a sample"
        inputs = [None if v is None else self.at_rows(v) for v in producer.inputs]
        node = ir.Node(
            producer.domain,
            producer.op_type,
            inputs,
            list(producer.attributes.values()),
            num_outputs=len(producer.outputs),
            version=producer.version,
            name=f"{producer.outputs[0].name}_rows",
        )
        self._insert(node)
        for old, new in zip(producer.outputs, node.outputs, strict=True):
            new.name, new.dtype = f"{old.name}_rows", old.dtype
            self.made[old] = new

    def _repeats(self, rank: int) -> ir.Value:
        """Repeats of each axis: as many as there are rows to a sample in the first, one in all others."""
        if self.ratio is None:
            rows = self._add("Shape", [self.anchor], None, attributes={"start": 0, "end": 1})
            samples = self._add("Shape", [self.sample], None, attributes={"start": 0, "end": 1})
            self.ratio = self._add("Div", [rows, samples], None)
        if rank == 1:
            return self.ratio
        if rank not in self.repeats:
            ones = ir.val(f"guidance_ones_{rank - 1}", const_value=ir.tensor(np.ones(rank - 1, np.int64)))
            self.graph.register_initializer(ones)
            self.repeats[rank] = self._add("Concat", [self.ratio, ones], None, attributes={"axis": 0})
        return self.repeats[rank]

    def _add(
        self,
        operator: str,
        inputs: list[ir.Value],
        like: ir.Value | None,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes=attributes)
        self._insert(node)
        output = node.outputs[0]
        output.name = f"guidance_{operator.lower()}_{len(self.graph)}"
        output.dtype = ir.DataType.INT64 if like is None else like.dtype
        if like is not None and like.shape is not None:
            output.shape = ir.Shape([ROWS, *list(like.shape)[1:]])
        return output

    def _insert(self, node: ir.Node) -> None:
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)


def _has_row_a_sample(value: ir.Value) -> bool:
    """Whether the leading dimension of a floating-point value is the batch and nothing else."""
    if value.shape is None or len(value.shape) == 0 or value.dtype is None or not value.dtype.is_floating_point():
        return False
    first = value.shape[0]
    return isinstance(first, ir.SymbolicDim) and first.value == BATCH


def _rename_batch(value: ir.Value) -> None:
    if value.shape is not None:
        value.shape = ir.Shape(
            ir.SymbolicDim(re.sub(rf"\b{BATCH}\b", ROWS, d.value)) if isinstance(d, ir.SymbolicDim) and d.value else d
            for d in value.shape
        )
