"""Layers that a LoRA may change: named in a graph, and listed in the bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from latentrt.exporter.components import Component
from latentrt.exporter.graphs.layers import name_folded_weights, record_layers
from latentrt.runtime.components.lora_weights import LAYERS_FILE, TRANSPOSED


class Three(nn.Module):
    """Three layers, of which two may have equal weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        return self.third(self.second(self.first(x)))


def with_constants(parse: Callable[[str], ir.Graph], module: Three) -> ir.Graph:
    """A graph whose constants are the transposed weights, as torch's exporter leaves them."""
    names = ("first", "second", "third")
    declared = "".join(f", float[4, 4] val_{name}" for name in names)
    graph = parse(
        f"g (float[n, 4] x{declared}) => (float[n, 4] out)"
        " { a = MatMul(x, val_first)  b = MatMul(a, val_second)  out = MatMul(b, val_third) }"
    )
    for name in names:
        value = next(each for each in graph.inputs if each.name == f"val_{name}")
        graph.inputs.remove(value)
        value.const_value = ir.tensor(getattr(module, name).weight.detach().T.contiguous().numpy())
        graph.register_initializer(value)
    return graph


def test_a_transposed_matrix_gets_the_name_of_its_layer(parse: Callable[[str], ir.Graph]) -> None:
    """Where two layers have equal weights neither does, since a constant would be of one of them alone."""
    module = Three()
    graph = with_constants(parse, module)
    name_folded_weights(graph, module)
    assert set(graph.initializers) == {f"{name}.weight{TRANSPOSED}" for name in ("first", "second", "third")}
    module.third.weight.data.copy_(module.first.weight.data)
    graph = with_constants(parse, module)
    name_folded_weights(graph, module)
    assert set(graph.initializers) == {"val_first", f"second.weight{TRANSPOSED}", "val_third"}


def test_layers_are_listed_with_the_shapes_of_their_weights(tmp_path: Path) -> None:
    """Those of equal weights have none; other components' entries stay; a component without LoRAs adds nothing."""
    module = Three()
    module.third.weight.data.copy_(module.first.weight.data)
    wrapped = nn.Module()
    wrapped.add_module("model", module)
    for name in ("text_encoder", "text_encoder_2", "vae_decoder"):
        record_layers(Component(name, wrapped, {}, {}, ("out",)), tmp_path)
    layers = {"first": None, "second": [4, 4], "third": None}
    assert json.loads((tmp_path / LAYERS_FILE).read_text()) == {"text_encoder": layers, "text_encoder_2": layers}
