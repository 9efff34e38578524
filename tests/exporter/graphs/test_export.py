"""Exports of small modules: names of dimensions, types at the borders, and what a file holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from latentrt.engines.errors import ExportError
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.exporter.components import Component
from latentrt.exporter.graphs.export import cast_inputs, export_component, parameter_count
from latentrt.exporter.graphs.targets import Form


class Scaled(nn.Module):
    """A linear layer, times a factor for each row."""

    def __init__(self, square: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.square = square

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        """``[batch, length, 4]`` and ``[batch]`` to ``[batch, length, 3]``."""
        if self.square:
            x = x.reshape(3, 5, 4)  # which fixes both lengths
        return self.linear(x) * factor[:, None, None].to(x.dtype)


def component(name: str = "scaled", square: bool = False) -> Component:
    example = {"x": torch.randn(3, 5, 4), "factor": torch.rand(3)}
    dynamic = {"x": {0: "batch", 1: "length"}, "factor": {0: "batch"}}
    return Component(name, Scaled(square).eval(), example, dynamic, ("out",), frozenset({"factor"}))


def test_an_export_computes_what_torch_computes_at_any_length(tmp_path: Path) -> None:
    """Dimensions have the component's names, and lengths may vary."""
    part = component()
    graph = export_component(part, Form(20, "fp32"), tmp_path)
    assert (graph.file, graph.external) == ("scaled/model.onnx", ())
    assert [str(spec) for spec in graph.inputs] == ["x: float32[batch, length, 4]", "factor: float32[batch]"]
    assert [str(spec) for spec in graph.outputs] == ["out: float32[batch, length, 3]"]
    x, factor = torch.randn(2, 7, 4), torch.rand(2)
    with OnnxRuntimeEngine(tmp_path / graph.file) as engine, torch.no_grad():
        result = engine.run({"x": x.numpy(), "factor": factor.numpy()})["out"]
        np.testing.assert_allclose(result, part.module(x, factor).numpy(), atol=1e-6)


def test_half_precision_is_exported_from_a_copy(tmp_path: Path) -> None:
    """Inputs are half but for those kept in fp32, bf16 has borders of fp32, and the module stays as it was."""
    part = component()
    assert {name: each.dtype for name, each in cast_inputs(part, part.example, "fp16").items()} == {
        "x": torch.float16,
        "factor": torch.float32,
    }
    half = export_component(part, Form(23, "fp16"), tmp_path)
    assert half.file == "scaled/model.opset23-fp16.onnx"
    assert [spec.dtype for spec in (*half.inputs, *half.outputs)] == ["float16", "float32", "float16"]
    brain = export_component(part, Form(23, "bf16"), tmp_path)
    assert {spec.dtype for spec in (*brain.inputs, *brain.outputs)} == {"float32"}
    assert {each.dtype for each in part.module.parameters()} == {torch.float32}
    assert parameter_count(part.module) == 15


def test_weights_that_a_lora_may_change_have_a_file_of_their_own(tmp_path: Path) -> None:
    """A text encoder's do, under their layers' names; and no file says where it was made."""
    graph = export_component(component("text_encoder"), Form(20, "fp32"), tmp_path)
    assert graph.external == ("text_encoder/model.onnx.data",)
    model = onnx.load(tmp_path / graph.file, load_external_data=False)
    assert "linear.weight.T" in {each.name for each in model.graph.initializer}
    assert not model.metadata_props
    assert not any(node.metadata_props for node in model.graph.node)


def test_a_dimension_that_became_fixed_is_named(tmp_path: Path) -> None:
    """A module that holds for one length alone cannot be exported for all."""
    with pytest.raises(ExportError, match="scaled"):
        export_component(component(square=True), Form(20, "fp32"), tmp_path)
    assert not list(tmp_path.iterdir())
