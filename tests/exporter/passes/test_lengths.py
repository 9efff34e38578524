"""Lengths that are measured on other inputs are the same lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.exporter.passes.lengths import measure_elsewhere

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]

MEASURED = """
step (float[batch, length, 3] text, float[batch, 2, length] keys, float[length] other) => (int64[1] out, {output})
{{
    length = Shape<start = 1, end = 2>(text)
    rows = Shape<start = {start}, end = 1>(text)
    sum = ReduceSum<keepdims = 0>(keys)
    whole = Cast<to = 7>(sum)
    out = Add(length, rows)
    {more}
}}
"""


def test_a_length_is_measured_on_what_is_there_anyway(parse: Parse, run: Run) -> None:
    """An input that is only measured goes where another has its lengths, and what is computed stays the same."""
    graph = parse(MEASURED.format(start=0, output="int64 whole", more=""))
    assert measure_elsewhere(graph, among=["keys"]) == ["text"]
    assert [value.name for value in graph.inputs] == ["keys", "other"]
    feeds = {"keys": np.zeros((5, 2, 7), np.float32), "other": np.zeros(7, np.float32)}
    assert run(graph, feeds)["out"] == [12]


@pytest.mark.parametrize(
    ("start", "output", "more", "among"),
    [
        (0, "int64 whole", "", []),
        (0, "int64 whole, float[batch, length, 3] copy", "copy = Identity(text)", ["keys"]),
        (-3, "int64 whole, int64[2] pair", "pair = Shape<end = 2>(text)", ["keys"]),
        (0, "int64 whole, int64[1] width", "width = Shape<start = 2>(text)", ["keys"]),
    ],
    ids=["nowhere else", "used", "two at once", "a number"],
)
def test_an_input_that_is_needed_stays(parse: Parse, start: int, output: str, more: str, among: list[str]) -> None:
    """Without another of its lengths, or with another use, nothing changes."""
    graph = parse(MEASURED.format(start=start, output=output, more=more))
    before = [(node.op_type, [str(value and value.name) for value in node.inputs]) for node in graph]
    assert measure_elsewhere(graph, among=among) == []
    assert [(node.op_type, [str(value and value.name) for value in node.inputs]) for node in graph] == before
