"""Types of exported graphs: what a strongly typed engine refuses is found when the graph is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from latentrt.engines.errors import ExportError
from latentrt.exporter.components import Component
from latentrt.exporter.graphs.export import export_component
from latentrt.exporter.graphs.targets import Form
from latentrt.exporter.graphs.type_check import check_graph


class Joined(nn.Module):
    """What SDXL's U-Net does with sizes and pooled text: joins what is fp32 at any precision to what may be half."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, text: Tensor, sizes: Tensor) -> Tensor:
        """Join ``[batch, 8]`` and ``[batch, 8]``."""
        return torch.concat([self.linear(text), torch.sin(sizes)], dim=-1)  # cat itself would be promoted


def joined() -> Component:
    example = {"text": torch.randn(3, 8), "sizes": torch.randn(3, 8)}
    return Component(
        "joined", Joined().eval(), example, {name: {0: "batch"} for name in example}, ("out",), frozenset({"sizes"})
    )


def test_half_joined_to_float_is_found_at_export(tmp_path: Path) -> None:
    """In fp32 the module exports; in half precision its Concat is named, with the types that meet there."""
    assert export_component(joined(), Form(20, "fp32"), tmp_path).precision == "fp32"
    message = r"joined: the exported graph is not well typed: Concat '.*' takes float16 '.*', float32 '.*' \(.*type"
    with pytest.raises(ExportError, match=message):
        export_component(joined(), Form(20, "fp16"), tmp_path)
    with pytest.raises(ExportError, match=r"not well typed: Concat '.*' takes bfloat16 '.*', float32 '.*'"):
        export_component(joined(), Form(23, "bf16"), tmp_path)


def save(path: Path, nodes: list[Any], weights: dict[str, Any] | None = None, output: int = TensorProto.FLOAT) -> Path:
    """A graph from float16 ``x`` and float32 ``y``, both ``[2, 4]``."""
    inputs = [
        helper.make_tensor_value_info(name, kind, [2, 4])
        for name, kind in (("x", TensorProto.FLOAT16), ("y", TensorProto.FLOAT))
    ]
    tensors = [numpy_helper.from_array(values, name) for name, values in (weights or {}).items()]
    outputs = [helper.make_tensor_value_info("out", output, ["rows", "columns"])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_sound_graph_passes(tmp_path: Path) -> None:
    """Casts make types fit; weights count by their type, large and small ones."""
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["wide", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["out"]),
    ]
    weights = {"w": np.ones((4, 4096), np.float32), "b": np.ones(4096, np.float32)}
    check_graph(save(tmp_path / "g.onnx", nodes, weights), "g")


@pytest.mark.parametrize("width", [4, 4096])
def test_a_weight_of_another_type_is_found(tmp_path: Path, width: int) -> None:
    """A weight in half precision that meets fp32 is named, also where the check leaves its values out."""
    nodes = [helper.make_node("MatMul", ["y", "w"], ["out"], name="product")]
    path = save(tmp_path / "g.onnx", nodes, {"w": np.ones((4, width), np.float16)})
    with pytest.raises(ExportError, match=r"^g: .* MatMul 'product' takes float32 'y', float16 'w'"):
        check_graph(path, "g")


def test_an_output_of_another_type_is_found(tmp_path: Path) -> None:
    """A graph whose output is not of the type that it says is refused."""
    nodes = [helper.make_node("Sin", ["x"], ["out"], name="sine")]
    with pytest.raises(ExportError, match=r"^g: the exported graph is not well typed: "):
        check_graph(save(tmp_path / "g.onnx", nodes), "g")


def test_a_value_without_a_type_is_found(tmp_path: Path) -> None:
    """An operator that nobody knows the result of would hide every fault behind it, and is named."""
    unknown = helper.make_node("Mystery", ["x"], ["riddle"], name="m", domain="nowhere")
    nodes = [unknown, helper.make_node("Concat", ["riddle", "y"], ["out"], name="join", axis=0)]
    path = save(tmp_path / "g.onnx", nodes)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    onnx.save(model, path)
    with pytest.raises(ExportError, match="the type of 'riddle', an output of Mystery 'm', is unknown"):
        check_graph(path, "g")


def test_what_is_no_graph_at_all_is_refused(tmp_path: Path) -> None:
    """Structure comes first: a value that nobody computes."""
    with pytest.raises(ExportError, match=r"^g: the exported graph is not valid: "):
        check_graph(save(tmp_path / "g.onnx", [helper.make_node("Sin", ["nothing"], ["out"])]), "g")
