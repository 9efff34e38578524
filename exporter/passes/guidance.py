"""Run what both halves of classifier-free guidance have in common once instead of twice."""

from __future__ import annotations

import re
from collections.abc import Collection

import onnx_ir as ir

from .builder import Builder
from .dependencies import captures, dependencies

BATCH, ROWS = "batch", "rows"
"""Names of the leading dimension: one row a sample, and one row a sample and half."""


def share_guidance(graph: ir.Graph, *, conditioned: Collection[str]) -> int:
    """Let everything that depends on latents and time alone run with one row a sample.

    Under guidance the unconditional and the conditional half see the same latents at the same time. Afterwards the
    inputs in ``conditioned`` have a row for each sample and half, in whatever order, and a new input ``rows``, int64
    ``[rows]``, says which sample each of them belongs to. Samples without guidance have one row.

    Cases:
        1. A node none of whose inputs depends on ``conditioned`` stays, and runs at ``batch``.
        2. A floating-point value that crosses to the other nodes and has one row a sample is gathered by ``rows``.
        3. The number of rows (the leading dimension of such a value) is that of ``rows``, its other dimensions are
           what they were.
        4. Anything else that crosses (a shape as a whole, a value whose leading dimension is a product) is computed
           again from what crosses by cases 2 and 3: gathering a shape would be wrong.

    Args:
        graph: The step graph; changed in place.
        conditioned: Inputs that differ between the halves.

    Returns:
        The number of nodes that run at ``batch`` now.

    Raises:
        ValueError: if the graph has an input called ``rows`` already, or a value crosses into the body of a loop or
            of a branch, which this pass does not look into.
    """
    if any(value.name == ROWS for value in graph.inputs):
        raise ValueError(f"the graph has an input {ROWS!r} already")
    found = dependencies(graph)
    names = set(conditioned)
    split = [node for node in graph if found[node.outputs[0]] & names]
    shared = [node for node in graph if found[node.outputs[0]] and not found[node.outputs[0]] & names]
    rewriter = _Rewriter(graph, {value for value, deps in found.items() if deps and not deps & names})
    for node in split:
        rewriter.builder.before = node
        if captured := [value for value in captures(node) if value in rewriter.shared]:
            raise ValueError(f"a subgraph of {node.op_type} {node.name!r} uses {captured[0].name!r} from outside")
        for index, value in enumerate(node.inputs):
            if value in rewriter.shared:
                node.replace_input_with(index, rewriter.at_rows(value))
    rewriter.builder.before = None
    for index, value in enumerate(graph.outputs):
        if value in rewriter.shared:
            graph.outputs[index] = rewriter.at_rows(value)
    # Runtimes reuse buffers between values whose dimensions have the same name, so the names must tell the truth.
    for value in (*(v for v in graph.inputs if v.name in names), *(v for node in split for v in node.outputs)):
        _rename_batch(value)
    return sum(1 for node in shared if any(output.uses() for output in node.outputs))


class _Rewriter:
    """Makes the version of a shared value that has one row a sample and half, once for each value."""

    def __init__(self, graph: ir.Graph, shared: set[ir.Value]) -> None:
        self.shared = shared
        self.builder = Builder(graph, "guidance")
        self._rows = self.builder.input(ROWS, ir.DataType.INT64, [ROWS])
        self._made: dict[ir.Value, ir.Value] = {}

    def at_rows(self, value: ir.Value) -> ir.Value:
        """``value`` itself if it is the same for any number of rows, else its gathered or recomputed version."""
        if value not in self.shared:
            return value
        if value not in self._made:
            if _has_row_a_sample(value):
                shape = [ROWS, *list(value.shape or ())[1:]]
                dtype = value.dtype or ir.DataType.FLOAT
                self._made[value] = self.builder.add("Gather", [value, self._rows], dtype, shape, axis=0)
            else:
                self._recompute(value)
        return self._made[value]

    def _recompute(self, value: ir.Value) -> None:
        producer = value.producer()
        assert producer is not None, "a graph input has one row a sample"
        if producer.op_type == "Shape" and (measured := producer.inputs[0]) is not None and _has_row_a_sample(measured):
            rank = len(measured.shape or ())
            first, last = dimensions_read(producer, rank)
            if first > 0:
                self._made[value] = value
                return
            if last == 1:
                self._made[value] = self.builder.add("Shape", [self._rows], ir.DataType.INT64, [1])
                return
        inputs = [None if v is None else self.at_rows(v) for v in producer.inputs]
        if all(new is old for new, old in zip(inputs, producer.inputs, strict=True)):
            self._made.update((output, output) for output in producer.outputs)
            return
        node = ir.Node(
            producer.domain,
            producer.op_type,
            inputs,
            list(producer.attributes.values()),
            num_outputs=len(producer.outputs),
            version=producer.version,
            name=f"{producer.outputs[0].name}_rows",
        )
        self.builder.insert(node)
        for old, new in zip(producer.outputs, node.outputs, strict=True):
            new.name, new.dtype = f"{old.name}_rows", old.dtype
            self._made[old] = new


def dimensions_read(shape: ir.Node, rank: int) -> tuple[int, int]:
    """First and last (exclusive) dimension that a Shape node reads."""
    start, end = (shape.attributes.get(name) for name in ("start", "end"))
    first, last = 0 if start is None else start.as_int(), rank if end is None else end.as_int()
    return first % rank if first < 0 else first, last % rank if last < 0 else last


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
