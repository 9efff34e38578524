"""Split a denoiser into what runs once a prompt, once a schedule, and once a step."""

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
"""Operators that compute nothing: running them again costs no more than reading what they would have left."""

_ASSUMED_LENGTH = 2
"""Length of a dimension that is only known by name, when bytes are compared."""


@dataclass(frozen=True)
class Stages:
    """A denoiser in up to three graphs; the outputs of the first two are inputs of ``step``, under the same names.

    Attributes:
        prompt: Runs once a request; ``None`` where nothing depends on the conditioning alone.
        schedule: Runs once a request with all timesteps as one batch; ``None`` where nothing depends on time alone.
        step: Runs at every step.
    """

    prompt: ir.Graph | None
    schedule: ir.Graph | None
    step: ir.Graph

    @property
    def prompt_tensors(self) -> tuple[str, ...]:
        """Names of what the prompt stage hands to the step."""
        return _names(self.prompt)

    @property
    def schedule_tensors(self) -> tuple[str, ...]:
        """Names of what the schedule stage hands to the step."""
        return _names(self.schedule)


def split_stages(
    graph: ir.Graph, *, conditioning: Collection[str], time: Collection[str], vectors: Collection[str] = ()
) -> Stages:
    """Split ``graph`` by the inputs that its values depend on.

    Cases:
        1. A value that depends on ``conditioning`` alone belongs to ``prompt``.
        2. A value that depends on ``time``, and on nothing else but ``vectors``, belongs to ``schedule``.
        3. Everything else belongs to ``step``; constants go along with whoever uses them.
        4. A value of the first two that a step uses is on the frontier, unless it is a shape computation, or moving
           its producer into ``step`` makes the frontier smaller in bytes: then ``step`` computes it.

    Args:
        graph: The denoiser; it is left as it is.
        conditioning: Inputs that change with the request alone (text states, pooled embeddings, image prompts).
        time: Inputs that change with the step alone, with one row a sample.
        vectors: The inputs among ``conditioning`` with one vector a sample, which a schedule may take in.

    Raises:
        ValueError: if an input that is named does not exist.
    """
    known = {str(value.name) for value in graph.inputs}
    if unknown := [name for name in (*conditioning, *time, *vectors) if name not in known]:
        raise ValueError(f"the graph has no input {unknown[0]!r}; it has {', '.join(sorted(known))}")
    found = dependencies(graph)
    hoisted = {
        value: stage
        for value, names in found.items()
        if value.producer() is not None and (stage := _stage(names, set(conditioning), set(time), set(vectors)))
    }
    frontier = _frontier(graph, hoisted)
    for value in _demoted(graph, hoisted, found):
        del hoisted[value]
    frontier = _frontier(graph, hoisted)
    prompt = [value for value in frontier if hoisted[value] == "prompt"]
    schedule = [value for value in frontier if hoisted[value] == "schedule"]
    return Stages(
        _extract(graph, _inputs_of(graph, prompt, found), prompt, "prompt"),
        _extract(graph, _inputs_of(graph, schedule, found), schedule, "schedule"),
        _step(graph, [*prompt, *schedule]),
    )


def _names(graph: ir.Graph | None) -> tuple[str, ...]:
    return () if graph is None else tuple(str(value.name) for value in graph.outputs)


def _stage(names: frozenset[str], conditioning: set[str], time: set[str], vectors: set[str]) -> str:
    if names and names <= conditioning:
        return "prompt"
    if names & time and names <= time | vectors:
        return "schedule"
    return ""


def _frontier(graph: ir.Graph, hoisted: Mapping[ir.Value, str]) -> list[ir.Value]:
    """Hoisted values that a node of the step uses, or that the graph returns."""
    used: dict[ir.Value, None] = {}
    for node in graph:
        if node.outputs[0] not in hoisted:
            used |= {value: None for value in node.inputs if value is not None and value in hoisted}
    return list(used | {value: None for value in graph.outputs if value in hoisted})


def _demoted(graph: ir.Graph, hoisted: Mapping[ir.Value, str], found: Dependencies) -> set[ir.Value]:
    """Values whose producers the step should run itself (case 4)."""
    kept = dict(hoisted)
    demoted: set[ir.Value] = set()
    changed = True
    while changed:
        changed = False
        for value in _frontier(graph, kept):
            producer = value.producer()
            if producer is None or producer.op_type not in MOVEMENT:
                continue
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
    """Size with every named length taken as a small one; infinite where not even the rank is known."""
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
    """The graph with the frontier as inputs, without what that leaves unused."""
    step = ir.convenience.extract(graph, [*graph.inputs, *frontier], list(graph.outputs))
    step.name = "step"
    unused = [value for value in step.inputs if not value.uses() and value not in step.outputs]
    for value in unused:
        step.inputs.remove(value)
    return step
