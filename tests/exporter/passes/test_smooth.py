"""Smoothing leaves products as they are, and makes them easier to quantise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.exporter.passes.quantize import FORMATS, find_layers
from latentrt.exporter.passes.smooth import factors, smooth, smoothable, smoothed_name
from latentrt.exporter.precision.observe import channel_magnitudes, largest_magnitudes, layer_sqnr

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def test_smoothing_keeps_products_and_raises_their_sqnr(
    network: ir.Graph,
    feeds: list[dict[str, NDArray[np.float32]]],
    tmp_path: Path,
    run: Run,
    written: Callable[[ir.Graph, Path], Path],
    relative: Callable[[NDArray[Any], NDArray[Any]], float],
) -> None:
    """With one channel a hundred times the others', smoothing leaves the product as it is and quantises it better."""
    kernel = network.initializers["kernel"].const_value
    assert kernel is not None
    wide = kernel.numpy().copy()
    wide[3] *= 100
    network.initializers["kernel"].const_value = ir.tensor(wide)
    expected = run(network, feeds[0])["y"]
    path = written(network, tmp_path / "plain.onnx")
    (layer,) = smoothable(network)
    assert layer.name == "MatMul_y"  # the other matrix product shares its activation with a Relu
    weights = network.initializers["matrix"].const_value
    assert weights is not None
    by = factors(channel_magnitudes(path, ["q"], feeds)["q"], np.abs(weights.numpy()).max(axis=1))
    before = layer_sqnr(path, [layer], largest_magnitudes(path, ["q"], feeds), FORMATS["int8"], feeds)["MatMul_y"]
    smooth(network, {"MatMul_y": by})
    assert relative(expected, run(network, feeds[0])["y"]) < 1e-6
    path = written(network, tmp_path / "smooth.onnx")
    (changed,) = [each for each in find_layers(network) if each.name == "MatMul_y"]
    assert changed.activation == smoothed_name(layer)
    ranges = largest_magnitudes(path, [changed.activation], feeds)
    assert layer_sqnr(path, [changed], ranges, FORMATS["int8"], feeds)["MatMul_y"] > before + 3
    with pytest.raises(ValueError, match="'Gemm_g' is no layer whose activation"):
        smooth(network, {"Gemm_g": by})
