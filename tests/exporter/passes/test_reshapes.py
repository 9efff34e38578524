"""Constant shapes of reshapes say what the computed ones said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.exporter.passes.dependencies import dependencies
from latentrt.exporter.passes.reshapes import reshape_by_own_lengths

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]

VIEWS = """
views (float[batch, 3, h] sample, float[batch, length, 6] text) => (float[batch, length, 2, 3] out, float[p, q] whole)
    <int64[1] two = {2}, int64[1] three = {3}, int64[1] rest = {-1}, int64[2] flat = {-1, 6}>
{
    rows = Shape<start=0, end=1>(sample)
    tokens = Shape<start=1, end=2>(text)
    heads = Concat<axis=0>(rows, tokens, two, three)
    out = Reshape<allowzero=1>(text, heads)
    both = Mul(rows, tokens)
    lengths = Concat<axis=0>(both, rest)
    whole = Reshape(text, lengths)
}
"""


def test_a_text_is_reshaped_by_its_own_lengths(parse: Parse, run: Run) -> None:
    """A view whose rows were measured on the latents depends on the text alone; one that cannot be stated so stays."""
    graph = parse(VIEWS)
    named = {value.name: value for node in graph for value in node.outputs}
    named["out"].shape = ir.Shape([ir.SymbolicDim("batch"), ir.SymbolicDim("length"), 2, 3])  # as the tracer says it
    feeds = {"sample": np.zeros((2, 3, 5), np.float32), "text": np.arange(48, dtype=np.float32).reshape(2, 4, 6)}
    before = run(parse(VIEWS), feeds)
    assert reshape_by_own_lengths(graph) == 1
    assert dependencies(graph)[named["out"]] == {"text"}
    assert dependencies(graph)[named["whole"]] == {"sample", "text"}
    for name, values in run(graph, feeds).items():
        np.testing.assert_array_equal(values, before[name])
