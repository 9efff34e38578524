"""Emulated precision, and a graph's figure that is computed with it, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from latentrt.engines.errors import VerificationError
from latentrt.exporter.components import Component
from latentrt.exporter.graphs.export import export_component, graph_entry
from latentrt.exporter.graphs.targets import Form
from latentrt.exporter.verification.bundle import graph_psnr
from latentrt.exporter.verification.emulate import EmulatedEngine, widened_copy

Parse = Callable[[str], ir.Graph]


def test_an_emulated_graph_rounds_as_half_precision_does(
    parse: Parse, written: Callable[[ir.Graph, Path], Path], tmp_path: Path
) -> None:
    """Every value is rounded, inputs are fp32, and the copy is gone afterwards."""
    graph = parse("g (float16[n] x) => (float16[n] y) { a = Mul(x, x)  y = Add(a, x) }")
    entry = graph_entry(graph, "g.onnx", Form(20, "fp16"), ())
    path = written(graph, tmp_path / "g.onnx")
    x = np.array([1 / 3, 300, 2], np.float32)
    with widened_copy(path, rounded=True) as copy, EmulatedEngine(copy, entry, "g") as engine:
        assert copy != path
        assert engine.inputs["x"].dtype == "float32"
        result = engine.run({"x": x})["y"]
    half = x.astype(np.float16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(result, (half * half + half).astype(np.float32))
    assert list(tmp_path.iterdir()) == [path]


def test_a_graph_in_fp32_is_copied_only_to_be_lowered(
    parse: Parse, written: Callable[[ir.Graph, Path], Path], tmp_path: Path
) -> None:
    """Without half precision the graph itself is run; lowered, what the model computes is rounded."""
    graph = parse("g (float[n] x) => (float[n] y) { a = Mul(x, x)  y = Neg(a) }")
    entry = graph_entry(graph, "g.onnx", Form(20, "fp32"), ())
    path = written(graph, tmp_path / "g.onnx")
    with widened_copy(path, rounded=True) as same:
        assert same == path
    x = np.array([1 / 3, 1.7], np.float32)
    with (
        widened_copy(path, rounded=True, lowered=ir.DataType.BFLOAT16, scratch=tmp_path) as copy,
        EmulatedEngine(copy, entry, "g") as engine,
    ):
        result = engine.run({"x": x})["y"]
    np.testing.assert_array_equal(result, -(x * x).astype(ml_dtypes.bfloat16).astype(np.float32))
    assert list(tmp_path.iterdir()) == [path]


class Linear(nn.Module):
    """A linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 16]`` to ``[batch, 8]``."""
        return self.linear(x)


@pytest.mark.parametrize(("form", "least", "most"), [(Form(20, "fp32"), 100, 999), (Form(23, "fp16"), 50, 90)])
def test_a_graph_has_the_figure_of_its_precision(tmp_path: Path, form: Form, least: float, most: float) -> None:
    """fp16 shows its roundings; a module with other weights falls below the gate."""
    part = Component("linear", Linear().eval(), {"x": torch.randn(3, 16)}, {"x": {0: "batch"}}, ("out",))
    graph = export_component(part, form, tmp_path)
    assert least < graph_psnr(part, graph, tmp_path) <= most
    part.module.get_parameter("linear.weight").data *= 1.1
    with pytest.raises(VerificationError, match="does not compute what its source computes"):
        graph_psnr(part, graph, tmp_path)
