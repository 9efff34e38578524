"""Figures of values that are measured inside a graph, against numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.exporter.passes.quantize import FORMATS, find_layers
from latentrt.exporter.precision.observe import best_ranges, channel_magnitudes, largest_magnitudes, layer_sqnr

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def test_observed_figures_are_numpys(
    network: ir.Graph,
    feeds: list[dict[str, NDArray[np.float32]]],
    tmp_path: Path,
    run: Run,
    parse: Parse,
    make_network: Callable[[], ir.Graph],
    written: Callable[[ir.Graph, Path], Path],
) -> None:
    """Magnitudes of values and of channels, and the SQNR of a layer, are what numpy computes from the values."""
    path = written(network, tmp_path / "plain.onnx")
    shown = make_network()
    values = {value.name: value for node in shown for value in node.outputs}
    shown.outputs.append(values["q"])
    q = [run(shown, each)["q"] for each in feeds]
    assert largest_magnitudes(path, ["q", "x"], feeds) == {
        "q": pytest.approx(max(each.max() for each in q)),
        "x": max(float(np.abs(each["x"]).max()) for each in feeds),
    }
    channels = channel_magnitudes(path, ["q"], feeds)["q"]
    np.testing.assert_allclose(channels, np.max([np.abs(each).max(axis=0) for each in q], axis=0))
    layer = next(layer for layer in find_layers(network) if layer.name == "MatMul_y")
    weights = network.initializers["matrix"].const_value
    assert weights is not None
    matrix, largest = weights.numpy(), max(each.max() for each in q)
    steps = np.abs(matrix).max(axis=0) / 127
    coarse = np.rint(matrix / steps).clip(-127, 127) * steps
    signal = noise = 0.0
    for each in q:
        rounded = np.rint(each / (largest / 127)).clip(-127, 127) * largest / 127
        signal += np.square(each @ matrix).sum()
        noise += np.square(each @ matrix - rounded @ coarse).sum()
    found = layer_sqnr(path, [layer], {"q": float(largest)}, FORMATS["int8"], feeds)
    assert found == {"MatMul_y": pytest.approx(10 * np.log10(signal / noise), abs=0.05)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["plain.onnx"]


def test_ranges_leave_outliers_out(parse: Parse, tmp_path: Path, written: Callable[[ir.Graph, Path], Path]) -> None:
    """One far value among many is cut off, since finer steps for all others gain more; evenly spread values are not."""
    graph = parse("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    path = written(graph, tmp_path / "g.onnx")
    rng = np.random.default_rng(0)
    spread = rng.uniform(-1, 1, 100_000).astype(np.float32)
    spread[0] = 1
    heavy = rng.standard_normal(100_000).astype(np.float32)
    heavy[0] = 12
    assert best_ranges(path, {"x": 1.0}, FORMATS["int8"], [{"x": spread}])["x"] == 1
    assert best_ranges(path, {"x": 12.0}, FORMATS["int8"], [{"x": heavy}])["x"] < 9
