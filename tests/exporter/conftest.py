"""What the exporter's tests share: small graphs and running them, damage for sources, exports that take no time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from latentrt.exporter.builder import construction
from latentrt.exporter.components import Component
from latentrt.exporter.graphs.targets import Form
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.reader import Bundle

EditJson = Callable[..., None]
Run = Callable[[ir.Graph, Mapping[str, NDArray[np.generic]]], dict[str, NDArray[np.generic]]]


@pytest.fixture
def edit_json() -> EditJson:
    """A function that changes entries of a JSON file; ``...`` removes one."""

    def edit(path: Path, **changes: Any) -> None:
        content = json.loads(path.read_text())
        content = {key: value for key, value in {**content, **changes}.items() if value is not ...}
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture
def change_weights() -> Callable[[Path], None]:
    """A function that adds one to the first number of every tensor of a source's text encoder."""

    def change(source: Path) -> None:
        file = source / "text_encoder" / "model.safetensors"
        tensors = load_file(file)
        for tensor in tensors.values():
            tensor.view(-1)[0] += 1
        save_file(tensors, file)

    return change


@pytest.fixture
def graph_files() -> tuple[str, ...]:
    """Files of the graphs of a Stable Diffusion bundle, stages too."""
    unet = ("unet/model.onnx", "unet/prompt.onnx", "unet/schedule.onnx", "unet/step.onnx")
    return ("text_encoder/model.onnx", *unet, "vae_decoder/model.onnx", "vae_encoder/model.onnx")


@pytest.fixture
def copied_exports(tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Exports copy the graph of the tiny SD 1.x bundle, whatever they are given; lists what was exported."""
    exported: list[str] = []
    bundle = Bundle.open(tiny_bundles["sd1"])

    def copy(component: Component, form: Form, directory: Path) -> Graph:
        known = bundle.graph(component.name, "opset20-fp32")
        file = f"{component.name}/model{form.suffix}.onnx"
        (directory / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(bundle.file(known.file), directory / file)
        for external in known.external:
            shutil.copyfile(bundle.file(external), directory / external)
        exported.append(f"{component.name} {form.name}")
        return Graph(file, form.precision, known.opset, known.inputs, known.outputs, known.external)

    monkeypatch.setattr(construction, "export_component", copy)
    return exported


_NETWORK = """
network (float[n, 4, h, w] x) => (float[n, 6] y, float[n, 4] z) {
    c = Conv <pads = [1, 1, 1, 1]> (x, kernel, bias)
    r = Relu(c)
    p = ReduceMean <keepdims = 0> (r, axes)
    q = Relu(p)
    y = MatMul(q, matrix)
    g = Gemm <transB = 1> (p, turned, offset)
    z = Softmax(g)
}
"""

_DENOISER = """
denoiser (float[batch, 4] latents, float[batch] time, float[batch, 3] text) => (float[batch, 4] out)
    <float[3, 4] key = {1,2,3,4,5,6,7,8,9,10,11,12}, int64[1] last = {1}, float[1] tenth = {0.1}>
{
    projected = MatMul(text, key)
    keys = Tanh(projected)
    column = Unsqueeze(time, last)
    scaled = Mul(column, tenth)
    clock = Sin(scaled)
    first = Mul(latents, tenth)
    second = Add(first, clock)
    third = Sigmoid(second)
    out = Mul(third, keys)
}
"""


_HALF = """
half (float16[n] x) => (float16[n] y, float16[n] big) {
    constant = Constant <value = float16[1] {23728}> ()
    large = Mul(x, constant)
    big = Mul(large, large)
    less = Div(big, big)
    widened = Cast <to = 1> (less)
    back = Cast <to = 10> (widened)
    y = Add(back, x)
}
"""


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


@pytest.fixture
def make_half() -> Callable[[], ir.Graph]:
    """A function that makes a graph in half precision, whose ``big`` overflows; nodes are called as their outputs."""

    def make() -> ir.Graph:
        graph = parse_graph(_HALF)
        for node in graph:
            node.name = str(node.outputs[0].name)
        return graph

    return make


@pytest.fixture
def denoiser() -> str:
    """The text of a graph with latents, time and text as inputs, small enough to read."""
    return _DENOISER


@pytest.fixture
def denoiser_feeds() -> dict[str, NDArray[np.float32]]:
    """Inputs of it."""
    return {
        "latents": np.arange(8, dtype=np.float32).reshape(2, 4),
        "time": np.array([3.0, 4.0], np.float32),
        "text": np.arange(6, dtype=np.float32).reshape(2, 3) / 50,
    }


def _network() -> ir.Graph:
    """A convolution, a matrix product and a Gemm with seeded weights."""
    rng = np.random.default_rng(0)
    declared = "float[8, 4, 3, 3] kernel, float[8] bias, int64[2] axes, float[8, 6] matrix"
    declared += ", float[4, 8] turned, float[4] offset"
    graph = parse_graph(_NETWORK.replace("x)", f"x, {declared})", 1))
    shapes = {"kernel": (8, 4, 3, 3), "bias": (8,), "matrix": (8, 6), "turned": (4, 8), "offset": (4,)}
    values: dict[str, NDArray[Any]] = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    values["axes"] = np.array([2, 3])
    for value in list(graph.inputs):
        if value.name in values:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(values[value.name])
            graph.register_initializer(value)
    for node in graph:
        node.name = f"{node.op_type}_{node.outputs[0].name}"
        if node.outputs[0].name in ("p", "q"):
            node.outputs[0].shape = ir.Shape(["n", 8])
    return graph


@pytest.fixture
def make_network() -> Callable[[], ir.Graph]:
    """A function that makes the same network each time."""
    return _network


@pytest.fixture
def network() -> ir.Graph:
    """The network, made anew."""
    return _network()


@pytest.fixture
def feeds() -> list[dict[str, NDArray[np.float32]]]:
    """Four inputs of two sizes."""
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 4, 5 + i % 2, 6)).astype(np.float32)} for i in range(4)]


@pytest.fixture
def written() -> Callable[[ir.Graph, Path], Path]:
    """A function that writes a graph as a file."""

    def write(graph: ir.Graph, path: Path) -> Path:
        ir.save(ir.Model(graph, ir_version=10), path)
        return path

    return write


@pytest.fixture
def relative() -> Callable[[NDArray[Any], NDArray[Any]], float]:
    """A function that gives the relative error of an array, in the Euclidean norm."""

    def error(expected: NDArray[Any], received: NDArray[Any]) -> float:
        return float(np.linalg.norm(received - expected) / np.linalg.norm(expected))

    return error
