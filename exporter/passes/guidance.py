"""Compute once, in place of twice, what both halves of classifier-free guidance have in common."""

from __future__ import annotations

import re
from collections.abc import Collection

import onnx_ir as ir

from .builder import Builder
from .dependencies import captures, dependencies

BATCH, ROWS = "batch", "rows"
"""Names of the leading dimension: one row for each sample, and one row for each half of each sample."""


def share_guidance(graph: ir.Graph, *, conditioned: Collection[str]) -> int:
    """Let everything that depends on latents and time alone run with one row for each sample.

    Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) predicts every sample twice, with and without its
    conditioning, from the same latents at the same time. What does not depend on the conditioning is therefore equal in
    both halves, and is computed here once.

    Afterwards the inputs in ``conditioned`` have a row for each half of each sample, in any order, and a new input
    ``rows``, int64 ``[rows]``, says which sample each of these rows belongs to. A sample without guidance has one row.

    Cases:
        1. A node that depends on none of ``conditioned`` is shared: it stays, and runs with the dimension ``batch``.
        2. All other nodes are split: they run with the dimension ``rows``. A shared value that a split node or a graph
           output takes crosses over, by one of the cases 3 to 6.
        3. A floating-point value whose leading dimension is ``batch`` crosses by ``Gather`` with ``rows``.
        4. A ``Shape`` of such a value that reads its leading dimension alone crosses as the length of ``rows``; one
           that leaves the leading dimension out is the same for both, and crosses unchanged.
        5. Any other value (a whole shape, a value whose leading dimension is a product) cannot be gathered. The node
           that computes it is copied, with inputs that cross by these cases.
        6. If no input of that node changes when it crosses, the value is the same for any number of rows, and crosses
           unchanged.

    Args:
        graph: The step graph; changed in place.
        conditioned: Inputs that differ between the halves.

    Returns:
        The number of nodes that now run with one row for each sample.

    Raises:
        ValueError: if the graph already has an input called ``rows``, or a shared value crosses into the subgraph of an
            ``If`` or ``Loop``, which this pass does not enter.
    """
    if any(value.name == ROWS for value in graph.inputs):
        raise ValueError(f"the graph has an input {ROWS!r} already")
    found = dependencies(graph)
    names = set(conditioned)
    # Case 1: nodes that depend on no input at all are constants, and count for neither side.
    shared = [node for node in graph if found[node.outputs[0]] and not found[node.outputs[0]] & names]
    split = [node for node in graph if found[node.outputs[0]] & names]
    crossing = _Crossing(graph, {value for value, inputs in found.items() if inputs and not inputs & names})

    # Case 2: each split node, and then each output of the graph, takes the version of a value that has all rows.
    for node in split:
        crossing.builder.before = node
        if captured := [value for value in captures(node) if value in crossing.shared]:
            raise ValueError(f"a subgraph of {node.op_type} {node.name!r} uses {captured[0].name!r} from outside")
        for index, value in enumerate(node.inputs):
            if value in crossing.shared:
                node.replace_input_with(index, crossing.with_rows(value))
    crossing.builder.before = None
    for index, value in enumerate(graph.outputs):
        if value in crossing.shared:
            graph.outputs[index] = crossing.with_rows(value)

    # Runtimes reuse a buffer for values whose dimensions have the same name, so no name may stand for two lengths.
    for value in (*(v for v in graph.inputs if v.name in names), *(v for node in split for v in node.outputs)):
        _rename_batch(value)
    return sum(1 for node in shared if any(output.uses() for output in node.outputs))


class _Crossing:
    """Makes the version of a shared value that has a row for each half of each sample, once for each value.

    Args:
        graph: Gains the input ``rows``, and the nodes that make these versions.
        shared: Values with one row for each sample.

    Attributes:
        shared: The same values.
        builder: Inserts the nodes; the caller sets where.
    """

    def __init__(self, graph: ir.Graph, shared: set[ir.Value]) -> None:
        self.shared = shared
        self.builder = Builder(graph, "guidance")
        self._rows = self.builder.input(ROWS, ir.DataType.INT64, [ROWS])
        self._made: dict[ir.Value, ir.Value] = {}

    def with_rows(self, value: ir.Value) -> ir.Value:
        """Return the version of a value that split nodes take; ``value`` itself if that is the same."""
        if value not in self.shared:
            return value
        if value not in self._made:
            if _has_batch_rows(value):
                # Case 3.
                shape = [ROWS, *list(value.shape or ())[1:]]
                dtype = value.dtype or ir.DataType.FLOAT
                self._made[value] = self.builder.add("Gather", [value, self._rows], dtype, shape, axis=0)
            else:
                self._recompute(value)
        return self._made[value]

    def _recompute(self, value: ir.Value) -> None:
        producer = value.producer()
        assert producer is not None, "a graph input has one row for each sample"

        # Case 4: a length is known without the values that it is measured on.
        if producer.op_type == "Shape" and (measured := producer.inputs[0]) is not None and _has_batch_rows(measured):
            rank = len(measured.shape or ())
            first, last = dimensions_read(producer, rank)
            if first > 0:
                self._made[value] = value
                return
            if last == 1:
                self._made[value] = self.builder.add("Shape", [self._rows], ir.DataType.INT64, [1])
                return

        # Case 6.
        inputs = [None if v is None else self.with_rows(v) for v in producer.inputs]
        if all(new is old for new, old in zip(inputs, producer.inputs, strict=True)):
            self._made.update((output, output) for output in producer.outputs)
            return

        # Case 5.
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
    """Return the first and the last (exclusive) dimension that a ``Shape`` node reads of a value of ``rank``."""
    start, end = (shape.attributes.get(name) for name in ("start", "end"))
    first, last = 0 if start is None else start.as_int(), rank if end is None else end.as_int()
    return first % rank if first < 0 else first, last % rank if last < 0 else last


def _has_batch_rows(value: ir.Value) -> bool:
    """Whether the leading dimension of a floating-point value is the batch and nothing else."""
    if value.shape is None or len(value.shape) == 0 or value.dtype is None or not value.dtype.is_floating_point():
        return False
    first = value.shape[0]
    return isinstance(first, ir.SymbolicDim) and first.value == BATCH


def _rename_batch(value: ir.Value) -> None:
    """Write ``rows`` for ``batch`` in the dimensions of a value, in products too."""
    if value.shape is not None:
        value.shape = ir.Shape(
            ir.SymbolicDim(re.sub(rf"\b{BATCH}\b", ROWS, d.value)) if isinstance(d, ir.SymbolicDim) and d.value else d
            for d in value.shape
        )
