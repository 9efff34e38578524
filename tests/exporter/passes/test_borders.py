"""Inputs and outputs of bf16 graphs, against ml_dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.exporter.passes.borders import float_borders

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def test_borders_of_bf16_are_fp32(parse: Parse, run: Run) -> None:
    """Inputs and outputs of bf16 become fp32 under their names; a second time nothing is left to do."""
    graph = parse("g (bfloat16[n] x) => (bfloat16[n] y, bfloat16[n] x2) { y = Identity(x)  x2 = Identity(y) }")
    assert float_borders(graph)
    x = np.array([1 / 3, 2.0], np.float32)
    results = run(graph, {"x": x})
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for name in ("y", "x2"):
        np.testing.assert_array_equal(results[name], expected)
    assert not float_borders(graph)
