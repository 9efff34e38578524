"""Half precision in fp32, with its roundings and without, against numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.exporter.passes.widen import round_values, widen

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def test_widened_graph_shows_what_half_precision_overflows_to(run: Run, make_half: Callable[[], ir.Graph]) -> None:
    """In fp32 the values are as they would be; with roundings they are what fp16 holds, infinity among it."""
    x = np.array([1 / 3, 2.0], np.float32)
    exact, rounded = make_half(), make_half()
    names = widen(exact)
    assert names == ["x", "constant", "large", "big", "less", "back", "y"]
    np.testing.assert_allclose(run(exact, {"x": x})["big"], (x * 300) ** 2, rtol=1e-6)
    np.testing.assert_allclose(run(exact, {"x": x})["y"], 1 + x, rtol=1e-6)
    assert widen(rounded, rounded=True) == names
    results = run(rounded, {"x": x})
    half = x.astype(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        big = (half * np.float16(300)) ** 2
        expected = (big / big + half).astype(np.float32)
    np.testing.assert_array_equal(results["big"], big.astype(np.float32))
    np.testing.assert_array_equal(results["y"], expected)
    assert np.isinf(results["big"][1])


def test_weights_that_are_widened_where_they_are_used(parse: Parse, run: Run) -> None:
    """The graph computes the same in fp32 while its weights stay half, each cast once for all who take it."""
    graph = parse("g (float16[n] x) => (float16[n] y) { a = Mul(x, w) y = Add(a, w) }")
    for node in graph:
        node.name = str(node.outputs[0].name)
    weight = np.array([1000.0], np.float16)
    value = ir.val("w", const_value=ir.tensor(weight, name="w"))
    graph.register_initializer(value)
    for node in graph:
        for place, taken in enumerate(node.inputs):
            if taken is not None and taken.name == "w":
                node.replace_input_with(place, value)
    widen(graph, weights=False)
    assert graph.initializers["w"].dtype == ir.DataType.FLOAT16
    assert [node.op_type for node in graph] == ["Cast", "Mul", "Add"]
    x = np.array([1 / 3, 2000.0], np.float32)
    np.testing.assert_allclose(run(graph, {"x": x})["y"], x * 1000 + 1000, rtol=1e-6)


def test_rounding_an_fp32_graph_leaves_out_what_is_named(
    network: ir.Graph, run: Run, relative: Callable[[NDArray[Any], NDArray[Any]], float]
) -> None:
    """Every value and weight is rounded to bf16, but for those whose names begin with the prefix, and the outputs."""
    x = np.random.default_rng(3).standard_normal((1, 4, 4, 4)).astype(np.float32)
    exact = run(network, {"x": x})["y"]
    round_values(network, ir.DataType.BFLOAT16, keep="q")
    assert 1e-4 < relative(exact, run(network, {"x": x})["y"]) < 2e-2
    assert not any(node.op_type == "Cast" and node.inputs[0] and node.inputs[0].name == "q" for node in network)
