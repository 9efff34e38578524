"""Small graphs in ONNX's text form, and running them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

Run = Callable[[ir.Graph, Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.generic]]]


def parse_graph(text: str) -> ir.Graph:
    """A graph from its text, with shapes inferred."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True)).graph


def run_graph(graph: ir.Graph, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Outputs by name, from ONNX Runtime."""
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As written: ONNX Runtime's own kernels for 8 bits add up in 16 bits on older processors, which can overflow.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    results = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    return dict(zip(names, results, strict=True))


@pytest.fixture
def parse() -> Callable[[str], ir.Graph]:
    """Text to graph."""
    return parse_graph


@pytest.fixture
def run() -> Run:
    """Run a graph in ONNX Runtime."""
    return run_graph
