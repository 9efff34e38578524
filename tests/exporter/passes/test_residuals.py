"""Residuals of ControlNets: added up in their steps, and taken in by a U-Net, against sums in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.exporter.passes.residuals import chain_residuals, take_residuals

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]

# Two values leave on the way down, and join in reverse order on the way up. The other two Concat nodes are no joins.
UNET = """
unet (float[batch, 1, h, w] sample) => (float[batch, 2, h, w] out, float[two, 1, h, w] other)
{
    first = Neg(sample)
    second = Concat<axis = 1>(first, first, first)
    middle = Exp(second)
    up = Concat<axis = 1>(middle, second)
    axes = Constant<value_ints = [1]>()
    narrow = ReduceSum<keepdims = 1>(up, axes)
    out = Concat<axis = -3>(narrow, first)
    other = Concat<axis = 0>(first, first)
}
"""
SHAPES = [(1, "h", "w"), (3, "h", "w"), (3, "h", "w")]


def test_residuals_go_to_skip_connections_and_the_middle(parse: Parse, run: Run) -> None:
    """Each is added to the skip connection that left in its place, the last to what the middle computes."""
    graph = parse(UNET)
    take_residuals(graph, SHAPES)
    assert [value.name for value in graph.inputs] == ["sample", "residual_0", "residual_1", "residual_2"]
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((1, 1, 2, 3), np.float32)
    residuals = [rng.standard_normal((1, channels, 2, 3), np.float32) for channels, _, _ in SHAPES]
    feeds = {"sample": sample, **{f"residual_{number}": each for number, each in enumerate(residuals)}}
    first = -sample
    second = np.concatenate([first, first, first], 1)
    narrow = (np.exp(second) + residuals[2]).sum(1, keepdims=True) + (second + residuals[1]).sum(1, keepdims=True)
    expected = np.concatenate([narrow, first + residuals[0]], 1)
    np.testing.assert_allclose(run(graph, feeds)["out"], expected, rtol=1e-5, atol=1e-6)


def test_residuals_of_another_width_are_refused(parse: Parse) -> None:
    """The number of channels must be that of the skip connection."""
    with pytest.raises(ValueError, match="skip connection 1 has 3 channels, expected 2"):
        take_residuals(parse(UNET), [(1, "h", "w"), (2, "h", "w"), (3, "h", "w")])


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_scaled_residuals_are_added_to_those_before(parse: Parse, run: Run, dtype: str) -> None:
    """Each output is its sum plus its residual times its column of scales, under its name and in its type."""
    graph = parse(
        f"control ({dtype}[rows, 2, h, w] x) => ({dtype}[rows, 2, h, w] a, {dtype}[rows, 2, h, w] b)"
        " { a = Neg(x)  b = Abs(x) }"
    )
    chain_residuals(graph, {"a": (2, "h", "w"), "b": (2, "h", "w")})
    rng = np.random.default_rng(0)
    kind = np.float32 if dtype == "float" else np.float16
    x, sum_0, sum_1 = (rng.standard_normal((3, 2, 2, 2)).astype(kind) for _ in range(3))
    scale = np.array([[1, 0], [0.5, 2], [0, -1]], np.float32)
    results = run(graph, {"x": x, "sum_0": sum_0, "sum_1": sum_1, "control_scale": scale})
    columns = scale.astype(kind)[:, :, None, None, None]
    assert list(results) == ["a", "b"]
    for name, expected in (("a", sum_0 - columns[:, 0] * x), ("b", sum_1 + columns[:, 1] * np.abs(x))):
        assert results[name].dtype == kind
        np.testing.assert_allclose(results[name], expected, atol=1e-2 if dtype == "float16" else 1e-6)


def test_a_graph_without_skip_connections_takes_no_residuals() -> None:
    """The message says how many were found; a chain wants as many outputs as shapes."""
    value = ir.val("x", ir.DataType.FLOAT, ["batch", 4, "h", "w"])
    graph = ir.Graph([value], [value], nodes=[], name="none", opset_imports={"": 20})
    with pytest.raises(ValueError, match="has 0 skip connections, expected 1"):
        take_residuals(graph, [(4, "h", "w")] * 2)
    with pytest.raises(ValueError, match="has 1 outputs, expected 2"):
        chain_residuals(graph, {"a": (4, "h", "w"), "b": (4, "h", "w")})
