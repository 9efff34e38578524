"""New nodes of a graph: where they stand, what they are called, and who uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.exporter.passes.builder import Builder

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]

TEXT = "g (float[n] x) => (float[n] y, float[n] new_neg_1) { y = Abs(x)  new_neg_1 = Exp(y) }"


def test_names_are_new_and_places_are_kept(parse: Parse) -> None:
    """A name that the graph has is passed over, and nodes stand in front of the one that is named, or at the end."""
    graph = parse(TEXT)
    builder = Builder(graph, "new")
    builder.before = graph[1]
    first = builder.add("Neg", [graph.outputs[0]], ir.DataType.FLOAT, ["n"])
    builder.before = None
    builder.add("Sin", [first], ir.DataType.FLOAT)
    assert [node.op_type for node in graph] == ["Abs", "Neg", "Exp", "Sin"]
    assert [node.outputs[0].name for node in graph] == ["y", "new_neg_2", "new_neg_1", "new_sin_3"]


def test_constants_and_inputs_belong_to_the_graph(parse: Parse, run: Run) -> None:
    """What is declared can be used, in element types that numpy lacks too."""
    graph = parse("g (float[n] x) => (float[n] y) { y = Abs(x) }")
    builder = Builder(graph, "new")
    other = builder.input("z", ir.DataType.FLOAT, ["n"])
    half = builder.tensor(0.5, ir.DataType.BFLOAT16)
    assert half.dtype == ir.DataType.BFLOAT16
    wide = builder.add("Cast", [half], ir.DataType.FLOAT, [], to=ir.DataType.FLOAT.value)
    scaled = builder.add("Mul", [other, wide], ir.DataType.FLOAT, ["n"])
    total = builder.add("Add", [scaled, builder.constant(1, np.float32)], ir.DataType.FLOAT, ["n"])
    graph.outputs.append(total)
    feeds = {"x": np.zeros(2, np.float32), "z": np.array([2, 4], np.float32)}
    np.testing.assert_array_equal(run(graph, feeds)[str(total.name)], [2, 3])


def test_users_of_a_value_use_its_casts(parse: Parse, run: Run) -> None:
    """Nodes and outputs of the graph use the last cast; an output keeps its name."""
    graph = parse(TEXT)
    value = graph.outputs[0]
    builder = Builder(graph, "new")
    builder.before = graph[1]
    builder.cast_for_users(value, ir.DataType.FLOAT16, ir.DataType.FLOAT, suffix="_exact")
    assert value.name == "y_exact"
    assert [each.name for each in graph.outputs] == ["y", "new_neg_1"]
    x = np.array([1 / 3, -2], np.float32)
    rounded = np.abs(x).astype(np.float16).astype(np.float32)
    results = run(graph, {"x": x})
    np.testing.assert_array_equal(results["y"], rounded)
    np.testing.assert_allclose(results["new_neg_1"], np.exp(rounded), rtol=1e-6)
