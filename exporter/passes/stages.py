"""Split a denoiser into stages: what runs once for a prompt, once for a schedule, and at every step of the loop."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from .dependencies import Dependencies, dependencies

MOVEMENT = frozenset(
    {"Cast", "Concat", "ConstantOfShape", "Expand", "Gather", "Identity", "Range", "Reshape", "Shape", "Slice", "Split"}
    | {"Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators that only move or create numbers: running one costs no more than reading its result from memory."""

_ASSUMED_LENGTH = 2
"""Length that a dimension known only by name is taken to have, when sizes in bytes are compared."""


@dataclass(frozen=True)
class Stages:
    """A denoiser in up to three graphs; the outputs of the first two are inputs of ``step``, under the same names.

    Attributes:
        prompt: Runs once for a request; ``None`` if nothing depends on the conditioning alone.
        schedule: Runs once for a request, with all timesteps as one batch; ``None`` if nothing depends on time alone.
        step: Runs at every step of the loop.
    """

    prompt: ir.Graph | None
    schedule: ir.Graph | None
    step: ir.Graph

    @property
    def prompt_tensors(self) -> tuple[str, ...]:
        """Names of the tensors that the prompt stage computes for the step."""
        return _output_names(self.prompt)

    @property
    def schedule_tensors(self) -> tuple[str, ...]:
        """Names of the tensors that the schedule stage computes for the step."""
        return _output_names(self.schedule)


def split_stages(
    graph: ir.Graph, *, conditioning: Collection[str], time: Collection[str], vectors: Collection[str] = ()
) -> Stages:
    """Split ``graph`` by the inputs that its values depend on.

    The stages together compute what the graph computes: a value is hoisted out of the step only if all inputs that
    reach it stay the same from step to step, or depend on nothing but the timestep, which is known beforehand.

    Cases:
        1. A value that depends on ``conditioning`` alone belongs to ``prompt``.
        2. A value that depends on ``time``, and on nothing else but ``vectors``, belongs to ``schedule``.
        3. Everything else belongs to ``step``. Constants, and what is computed from constants alone, go into every
           stage that uses them.
        4. A value of cases 1 and 2 that a node of the step uses, or that the graph returns, is on the frontier: its
           stage returns it, and the step takes it as an input.
        5. A value on the frontier that an operator of :data:`MOVEMENT` computes moves into ``step`` with its producer,
           if it is a shape, or if that makes the frontier smaller in bytes.

    Args:
        graph: The denoiser; it stays unchanged.
        conditioning: Inputs that change with the request alone (text states, pooled embeddings, image prompts).
        time: Inputs that change with the step alone, with one row for each sample.
        vectors: The inputs among ``conditioning`` that have one vector for each sample; the schedule stage may use
            them.

    Raises:
        ValueError: if the graph lacks one of these inputs.
    """
    known = {str(value.name) for value in graph.inputs}
    if unknown := [name for name in (*conditioning, *time, *vectors) if name not in known]:
        raise ValueError(f"the graph has no input {unknown[0]!r}; it has {', '.join(sorted(known))}")
    # Cases 1 to 3: the stage of each value that does not stay in the step.
    found = dependencies(graph)
    hoisted = {
        value: stage
        for value, names in found.items()
        if value.producer() is not None and (stage := _stage(names, set(conditioning), set(time), set(vectors)))
    }
    # Case 5.
    for value in _demoted(graph, hoisted, found):
        del hoisted[value]
    # Case 4.
    frontier = _frontier(graph, hoisted)
    prompt = [value for value in frontier if hoisted[value] == "prompt"]
    schedule = [value for value in frontier if hoisted[value] == "schedule"]
    return Stages(
        _extract(graph, _inputs_of(graph, prompt, found), prompt, "prompt"),
        _extract(graph, _inputs_of(graph, schedule, found), schedule, "schedule"),
        _step(graph, [*prompt, *schedule]),
    )


def _output_names(graph: ir.Graph | None) -> tuple[str, ...]:
    return () if graph is None else tuple(str(value.name) for value in graph.outputs)


def _stage(names: frozenset[str], conditioning: set[str], time: set[str], vectors: set[str]) -> str:
    """Return the stage of a value that depends on the inputs ``names``; an empty string is the step."""
    if names and names <= conditioning:
        return "prompt"
    if names & time and names <= time | vectors:
        return "schedule"
    return ""


def _frontier(graph: ir.Graph, hoisted: Mapping[ir.Value, str]) -> list[ir.Value]:
    """List the hoisted values that a node of the step uses or the graph returns (case 4), in the order of their use."""
    used: dict[ir.Value, None] = {}
    for node in graph:
        if node.outputs[0] not in hoisted:
            used |= {value: None for value in node.inputs if value is not None and value in hoisted}
    return list(used | {value: None for value in graph.outputs if value in hoisted})


def _demoted(graph: ir.Graph, hoisted: Mapping[ir.Value, str], found: Dependencies) -> set[ir.Value]:
    """Return the hoisted values that move into the step (case 5)."""
    # A move puts the producer's inputs on the frontier, and one of these may be worth moving in turn: the search is
    # repeated until it finds nothing.
    kept = dict(hoisted)
    demoted: set[ir.Value] = set()
    changed = True
    while changed:
        changed = False
        for value in _frontier(graph, kept):
            producer = value.producer()
            if producer is None or producer.op_type not in MOVEMENT:
                continue
            # Inputs that are on the frontier already, and constants, cost nothing more.
            others = {v for v in producer.inputs if v is not None and found.get(v)} - set(_frontier(graph, kept))
            if _is_shape(value) or sum(map(_bytes, others)) < _bytes(value):
                for output in producer.outputs:
                    demoted.add(output)
                    kept.pop(output, None)
                changed = True
    return demoted


def _is_shape(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and (value.shape is None or len(value.shape) <= 1)


def _bytes(value: ir.Value) -> float:
    """Return the size of a value with a small length for each named dimension; infinite if the rank is unknown."""
    if value.shape is None or value.dtype is None:
        return math.inf
    lengths = (d if isinstance(d, int) else _ASSUMED_LENGTH for d in value.shape)
    return float(math.prod(lengths) * value.dtype.itemsize)


def _inputs_of(graph: ir.Graph, outputs: Iterable[ir.Value], found: Dependencies) -> list[ir.Value]:
    names = frozenset[str]().union(*(found[value] for value in outputs))
    return [value for value in graph.inputs if value.name in names]


def _extract(graph: ir.Graph, inputs: list[ir.Value], outputs: list[ir.Value], name: str) -> ir.Graph | None:
    if not outputs:
        return None
    part = ir.convenience.extract(graph, inputs, outputs)
    part.name = name
    return part


def _step(graph: ir.Graph, frontier: list[ir.Value]) -> ir.Graph:
    """Return the graph with the frontier as inputs, without the nodes and inputs that this leaves unused."""
    step = ir.convenience.extract(graph, [*graph.inputs, *frontier], list(graph.outputs))
    step.name = "step"
    unused = [value for value in step.inputs if not value.uses() and value not in step.outputs]
    for value in unused:
        step.inputs.remove(value)
    return step
