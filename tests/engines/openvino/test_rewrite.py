"""Rewrites of OpenVINO models (with ``graph``) give what ONNX Runtime gives on the graph before them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines.openvino.engine import OpenVinoEngine, OpenVinoOptions, load_sdk, read_onnx
from latentrt.engines.openvino.rewrite import convolve_before_upsampling, split_gates

RNG = np.random.default_rng(0)
Array = NDArray[Any]
KERNEL = RNG.standard_normal((6, 5, 3, 3)).astype(np.float32)
MATRIX = RNG.standard_normal((8, 12)).astype(np.float32)


class Graph:
    """A small graph in the making."""

    def __init__(self, dtype: int = TensorProto.FLOAT) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.dtype = dtype

    def constant(self, name: str, values: Array) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"{operator.lower()}{len(self.nodes)}_{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[0]

    def quantized(self, value: str, scale: float) -> str:
        """A value after rounding to 8 bits."""
        parameters = [
            self.constant(f"{value}_scale", np.array(scale, np.float32)),
            self.constant(f"{value}_zero", np.array(0, np.int8)),
        ]
        return self.add("DequantizeLinear", self.add("QuantizeLinear", value, *parameters), *parameters)

    def stored(self, name: str, values: Array, axis: int) -> str:
        """Weights in 8 bits, with a scale for each entry of an axis."""
        others = tuple(each for each in range(values.ndim) if each != axis)
        scales = (np.abs(values).max(axis=others) / 127).astype(np.float32)
        shape = [-1 if each == axis else 1 for each in range(values.ndim)]
        integers = np.rint(values / scales.reshape(shape)).astype(np.int8)
        return self.add(
            "DequantizeLinear",
            self.constant(name, integers),
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero", np.zeros(len(scales), np.int8)),
            axis=axis,
        )

    def save(self, path: Path, shape: list[Any], *results: str) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", self.dtype, shape)],
            [helper.make_tensor_value_info(result, self.dtype, None) for result in results],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(model))
        onnx.save(model, path)
        return path


def upsample(graph: Graph, value: str, *, sizes: list[int] | None = None, scales: list[float] | None = None) -> str:
    by = ("", graph.constant("scales", np.array(scales, np.float32))) if scales else ("", "")
    to = (graph.constant("sizes", np.array(sizes, np.int64)),) if sizes else ()
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return graph.add("Resize", value, *by, *to, **how)


def convolution(path: Path, sizes: list[int] | None, scales: list[float] | None, *, bits: int = 32) -> Path:
    """Upsampling, then a 3x3 convolution with a bias."""
    graph = Graph(TensorProto.FLOAT16 if bits == 16 else TensorProto.FLOAT)
    kernel, kind = KERNEL, np.float16 if bits == 16 else np.float32
    large = upsample(graph, "x", sizes=sizes, scales=scales)
    if bits == 8:
        large, weight = graph.quantized(large, 4 / 127), graph.stored("w", kernel, 0)
    else:
        weight = graph.constant("w", kernel.astype(kind))
    bias = graph.constant("b", np.arange(6).astype(kind))
    return graph.save(path, ["batch", 5, "height", "width"], graph.add("Conv", large, weight, bias, pads=[1, 1, 1, 1]))


def gate(path: Path, *, bits: int = 32, both: bool = False) -> Path:
    """A linear layer whose halves are multiplied."""
    graph = Graph()
    x, weight = "x", ""
    if bits == 8:
        x, weight = graph.quantized("x", 4 / 127), graph.stored("w", MATRIX, 1)
    else:
        weight = graph.constant("w", MATRIX)
    total = graph.add("Add", graph.add("MatMul", x, weight), graph.constant("b", np.arange(12, dtype=np.float32)))
    halves = graph.add("Split", total, outputs=2, axis=-1, num_outputs=2)
    product = graph.add("Mul", halves, graph.add("Sigmoid", halves.replace("_0", "_1")))
    return graph.save(path, ["batch", "tokens", 8], product, *([total] if both else []))


def expected(path: Path, x: Array) -> list[Array]:
    """Of ONNX Runtime, with every rounding that the graph has."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def received(path: Path, x: Array) -> list[Array]:
    with OpenVinoEngine(path) as engine:
        return list(engine.run({"x": x}).values())


def places(path: Path, rewriting: Callable[[Any, Any], int], shape: list[int] | None = None) -> tuple[int, Any]:
    """How many places change, and the model that comes of it."""
    model = read_onnx(path)
    if shape:
        model.reshape({"x": shape})
    return rewriting(model, load_sdk()), model


def kinds(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


@pytest.mark.parametrize("shape", [(1, 5, 4, 4), (2, 5, 7, 3), (1, 5, 1, 2)])
def test_convolutions_of_upsampled_pictures_are_computed_on_the_small_ones(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """Four small convolutions take the place of one, of whatever size, and edges are right."""
    path = convolution(tmp_path / "m.onnx", None, [1, 1, 2, 2])
    count, model = places(path, convolve_before_upsampling)
    assert count == 1
    assert kinds(model).count("Convolution") == 4
    assert "Interpolate" not in kinds(model)
    x = RNG.standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(received(path, x)[0], expected(path, x)[0], atol=2e-5)


def test_known_sizes_are_as_good_as_a_factor(tmp_path: Path) -> None:
    """Sizes that are exactly twice as large change the model once lengths are fixed, and only then."""
    path = convolution(tmp_path / "m.onnx", [2, 5, 8, 6], None)
    assert places(path, convolve_before_upsampling)[0] == 0
    assert places(path, convolve_before_upsampling, [2, 5, 4, 3])[0] == 1
    x = RNG.standard_normal((2, 5, 4, 3)).astype(np.float32)
    (height, width) = (f"x_{axis}" for axis in (2, 3))
    with OpenVinoEngine(path, OpenVinoOptions(shapes={height: 4, width: 3})) as engine:
        layers = [node.get_rt_info()["layerType"].astype(str) for node in _runtime(engine)]
        assert layers.count("Convolution") == 4
        np.testing.assert_allclose(next(iter(engine.run({"x": x}).values())), expected(path, x)[0], atol=2e-5)


def _runtime(engine: OpenVinoEngine) -> list[Any]:
    return list(engine.opened.model.get_runtime_model().get_ordered_ops())


@pytest.mark.parametrize(("sizes", "shape"), [([1, 5, 7, 8], [1, 5, 4, 4]), ([1, 5, 12, 8], [1, 5, 4, 4])])
def test_other_sizes_are_left_as_they_are(tmp_path: Path, sizes: list[int], shape: list[int]) -> None:
    """A picture whose last row is cut off, or that is made three times as high, cannot be computed so."""
    path = convolution(tmp_path / "m.onnx", sizes, None)
    assert places(path, convolve_before_upsampling, shape)[0] == 0
    x = RNG.standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(received(path, x)[0], expected(path, x)[0], atol=2e-5)


def test_a_picture_that_is_needed_elsewhere_too_is_left(tmp_path: Path) -> None:
    """An upsampled picture with a second user stays, and so does its convolution."""
    graph = Graph()
    large = upsample(graph, "x", scales=[1, 1, 2, 2])
    first = graph.add("Conv", large, graph.constant("w", KERNEL), pads=[1, 1, 1, 1])
    path = graph.save(tmp_path / "m.onnx", ["batch", 5, "height", "width"], first, graph.add("Relu", large))
    assert places(path, convolve_before_upsampling)[0] == 0


def test_only_convolutions_of_3x3_with_a_pixel_of_padding_change(tmp_path: Path) -> None:
    """One that skips pixels, or has no padding, is left."""
    for number, attributes in enumerate(({"pads": [1, 1, 1, 1], "strides": [2, 2]}, {"pads": [0, 0, 0, 0]})):
        graph = Graph()
        large = upsample(graph, "x", scales=[1, 1, 2, 2])
        last = graph.add("Conv", large, graph.constant("w", KERNEL), **attributes)
        path = graph.save(tmp_path / f"{number}.onnx", ["batch", 5, "height", "width"], last)
        assert places(path, convolve_before_upsampling)[0] == 0


def test_quantised_convolutions_stay_quantised(tmp_path: Path) -> None:
    """Kernels are stored in 8 bits again; results differ by no more than that rounds."""
    path = convolution(tmp_path / "m.onnx", None, [1, 1, 2, 2], bits=8)
    count, model = places(path, convolve_before_upsampling)
    stored = [
        node.get_output_shape(0)
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "i8"
    ]
    assert count == 1
    assert [list(shape) for shape in stored if len(shape) == 4] == [[6, 5, 2, 2]] * 4
    x = RNG.standard_normal((2, 5, 6, 4)).astype(np.float32)
    wanted, found = expected(path, x)[0], received(path, x)[0]
    assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted)


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    """A graph of fp16 gets kernels of fp16."""
    path = convolution(tmp_path / "m.onnx", None, [1, 1, 2, 2], bits=16)
    assert places(path, convolve_before_upsampling)[0] == 1
    x = RNG.standard_normal((1, 5, 4, 4)).astype(np.float16)
    wanted, found = expected(path, x)[0].astype(np.float32), received(path, x)[0].astype(np.float32)
    assert np.linalg.norm(found - wanted) < 2e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-5), (8, 2e-3)])
def test_gates_become_two_products(tmp_path: Path, bits: int, tolerance: float) -> None:
    """A layer that is cut in two becomes two layers, with weights of the kind that it had."""
    path = gate(tmp_path / "m.onnx", bits=bits)
    count, model = places(path, split_gates)
    assert count == 1
    assert kinds(model).count("MatMul") == 2
    assert "Split" not in kinds(model)
    x = RNG.standard_normal((3, 7, 8)).astype(np.float32)
    wanted, found = expected(path, x)[0], received(path, x)[0]
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)


def test_a_gate_that_is_needed_whole_too_is_left(tmp_path: Path) -> None:
    """A sum with a second user is computed once."""
    path = gate(tmp_path / "m.onnx", both=True)
    assert places(path, split_gates)[0] == 0
    x = RNG.standard_normal((2, 3, 8)).astype(np.float32)
    for found, wanted in zip(received(path, x), expected(path, x), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_weights_that_were_exchanged_are_rewritten(tmp_path: Path) -> None:
    """Weights put in place of a graph's own count, not those."""
    path, other = convolution(tmp_path / "m.onnx", None, [1, 1, 2, 2]), KERNEL[::-1].copy()
    x = RNG.standard_normal((1, 5, 4, 4)).astype(np.float32)
    model = onnx.load(path)
    model.graph.initializer[[each.name for each in model.graph.initializer].index("w")].CopyFrom(
        numpy_helper.from_array(other, "w")
    )
    onnx.save(model, tmp_path / "other.onnx")
    with OpenVinoEngine(path, weights={"w": other}) as engine:
        found = next(iter(engine.run({"x": x}).values()))
    np.testing.assert_allclose(found, expected(tmp_path / "other.onnx", x)[0], atol=2e-5)
