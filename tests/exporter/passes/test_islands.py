"""Islands of fp32 in half precision, against numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.exporter.passes.islands import keep_fp32

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def test_island_computes_in_fp32_and_the_rest_stays_half(run: Run, make_half: Callable[[], ir.Graph]) -> None:
    """What overflows runs in fp32 with those who take it; the others do not, and the graph computes what it should."""
    graph = make_half()
    assert keep_fp32(graph, ["big"]) == 2
    x = np.array([1 / 3, 2.0], np.float16)
    results = run(graph, {"x": x})
    assert results["big"].dtype == np.float32
    np.testing.assert_allclose(results["big"], (x.astype(np.float32) * 300) ** 2, rtol=2e-3)
    np.testing.assert_allclose(results["y"].astype(np.float32), 1 + x.astype(np.float32), rtol=2e-3)
    assert results["y"].dtype == np.float16
    kept = {value.name: value.dtype for node in graph for value in node.outputs}
    assert kept["large"] == ir.DataType.FLOAT16
    assert kept["big"] == ir.DataType.FLOAT
    with pytest.raises(ValueError, match="computes 'nothing'"):
        keep_fp32(graph, ["nothing"])


def test_what_leaves_an_island_is_half_again(parse: Parse, run: Run) -> None:
    """A result that is not named goes back to fp16 for nodes and outputs of the graph, under its name."""
    graph = parse(
        "half (float16[n] x) => (float16[n] y, float16[n] less)"
        " { big = Mul(x, x)  less = Div(x, big)  y = Add(less, x) }"
    )
    assert keep_fp32(graph, ["big"]) == 2
    assert [value.dtype for value in graph.outputs] == [ir.DataType.FLOAT16] * 2
    x = np.array([1 / 3, 300], np.float16)
    results = run(graph, {"x": x})
    wide = x.astype(np.float32)
    less = (wide / (wide * wide)).astype(np.float16)
    np.testing.assert_array_equal(results["less"], less)
    np.testing.assert_array_equal(results["y"], less + x)
