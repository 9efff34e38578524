"""Quantising, smoothing, widening and islands, each against ONNX Runtime running the graph before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from latentrt.exporter.passes.borders import float_borders
from latentrt.exporter.passes.islands import keep_fp32
from latentrt.exporter.passes.quantize import FORMATS, find_layers, quantize, quantized_share, representable
from latentrt.exporter.passes.smooth import factors, smooth, smoothable, smoothed_name
from latentrt.exporter.passes.widen import round_values, widen
from latentrt.exporter.precision.observe import best_ranges, channel_magnitudes, largest_magnitudes, layer_sqnr

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]

NETWORK = """
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


def make_network(parse: Parse) -> ir.Graph:
    """A convolution, a matrix product and a Gemm with seeded weights."""
    rng = np.random.default_rng(0)
    declared = "float[8, 4, 3, 3] kernel, float[8] bias, int64[2] axes, float[8, 6] matrix"
    declared += ", float[4, 8] turned, float[4] offset"
    graph = parse(NETWORK.replace("x)", f"x, {declared})", 1))
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
def network(parse: Parse) -> ir.Graph:
    """The network, made anew."""
    return make_network(parse)


@pytest.fixture
def feeds() -> list[dict[str, NDArray[np.float32]]]:
    """Four inputs of two sizes."""
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 4, 5 + i % 2, 6)).astype(np.float32)} for i in range(4)]


def written(graph: ir.Graph, path: Path) -> Path:
    """The graph as a file."""
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def relative(expected: NDArray[Any], received: NDArray[Any]) -> float:
    return float(np.linalg.norm(received - expected) / np.linalg.norm(expected))


# --- quantising


def test_layers_that_can_be_quantised(network: ir.Graph, parse: Parse) -> None:
    """Products with constant weights are found with the axis of their output channels; those of activations are not."""
    found = [
        (layer.operator, layer.activation, layer.weight, layer.axis, layer.depth) for layer in find_layers(network)
    ]
    assert found == [
        ("Conv", "x", "kernel", 0, 36),
        ("MatMul", "q", "matrix", 1, 8),
        ("Gemm", "p", "turned", 0, 8),
    ]
    assert find_layers(parse("g (float[2, 2] a, float[2, 2] b) => (float[2, 2] c) { c = MatMul(a, b) }")) == []


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands ONNX Runtime's quantiser the inputs."""

    def __init__(self, feeds: list[dict[str, NDArray[np.float32]]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._left, None)


def test_scales_and_stored_weights_are_those_of_onnx_runtime(
    network: ir.Graph, feeds: list[dict[str, NDArray[np.float32]]], tmp_path: Path, parse: Parse
) -> None:
    """With the largest magnitudes as ranges, both store the same numbers with the same scales."""
    plain = written(network, tmp_path / "plain.onnx")
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    quantize_static(
        plain, tmp_path / "theirs.onnx", Reader(feeds), QuantFormat.QDQ, per_channel=True,
        op_types_to_quantize=["Conv", "MatMul"], extra_options=options, **types,
    )  # fmt: skip
    theirs = {
        each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "theirs.onnx").graph.initializer
    }
    ours = make_network(parse)
    ranges = largest_magnitudes(plain, ["x", "q"], feeds)
    names = quantize(ours, FORMATS["int8"], ranges, layers=["Conv_c", "MatMul_y"])
    assert names == ["Conv_c", "MatMul_y"]
    for weight in ("kernel", "matrix"):
        stored = ours.initializers[f"{weight}_int8"]
        (dequantised,) = (use.node for use in stored.uses())
        scale = dequantised.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        np.testing.assert_allclose(scale.const_value.numpy(), theirs[f"{weight}_scale"], rtol=1e-6)
        assert stored.const_value is not None
        # Half a step may fall to either side.
        assert np.abs(stored.const_value.numpy().astype(int) - theirs[f"{weight}_quantized"]).max() <= 1
        assert (stored.const_value.numpy() == theirs[f"{weight}_quantized"]).mean() > 0.98
    for activation in ("x", "q"):
        assert ranges[activation] / 127 == pytest.approx(float(theirs[f"{activation}_scale"]), rel=1e-5)


@pytest.mark.parametrize(("name", "error"), [("int8", 0.02), ("fp8", 0.08)])
def test_quantised_graph_computes_nearly_the_same(
    network: ir.Graph, feeds: list[dict[str, NDArray[np.float32]]], tmp_path: Path, run: Run, name: str, error: float
) -> None:
    """Rounding to 8 bits shows, and no more than its steps explain."""
    path = written(network, tmp_path / "plain.onnx")
    expected = run(network, feeds[0])["y"]
    ranges = largest_magnitudes(path, [layer.activation for layer in find_layers(network)], feeds)
    quantize(network, FORMATS[name], ranges)
    assert find_layers(network) == []
    assert 1e-4 < relative(expected, run(network, feeds[0])["y"]) < error
    assert not {"kernel", "matrix", "turned"} & set(network.initializers)


def test_weights_alone(network: ir.Graph, feeds: list[dict[str, NDArray[np.float32]]], run: Run) -> None:
    """Without ranges only weights are stored in 8 bits; what is left out stays as it is, and counts."""
    expected = run(network, feeds[0])["y"]
    quantize(network, FORMATS["int8"], None, layers=["Conv_c"])
    assert [node.op_type for node in network].count("QuantizeLinear") == 0
    assert 1e-5 < relative(expected, run(network, feeds[0])["y"]) < 0.01
    assert quantized_share(network, ["MatMul_y"]) == 48 / (48 + 32)


def test_what_cannot_be_quantised_is_refused(network: ir.Graph) -> None:
    """A layer without a range, and one that is none, are named."""
    with pytest.raises(ValueError, match="no range of 'x', which 'Conv_c' takes"):
        quantize(network, FORMATS["int8"], {})
    with pytest.raises(ValueError, match="'Relu_r' is no layer"):
        quantize(network, FORMATS["int8"], {}, layers=["Relu_r"])


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_scales_are_rounded_upwards(dtype: ir.DataType) -> None:
    """A scale in the graph's own type is never below the exact one, which would saturate, nor zero."""
    exact = np.array([0, 1e-30, 1e-7, 1 / 3, 0.1, 5.0], np.float32)
    rounded = representable(exact, dtype)
    assert (rounded >= exact).all()
    assert (rounded.astype(dtype.numpy()).astype(np.float32) == rounded).all()
    assert (rounded > 0).all()
    assert (rounded[3:] <= exact[3:] * 1.01).all()


def test_fp8_is_stored_as_ml_dtypes_rounds() -> None:
    """Numbers of E4M3 are those of an independent implementation, saturated at 448."""
    values = np.concatenate([np.linspace(-448, 448, 1001), [1e9, -1e9, 1e-5]]).astype(np.float32)
    expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(FORMATS["fp8"].store(values).numpy().astype(np.float32), expected)


# --- observing


def test_observed_figures_are_numpys(
    network: ir.Graph, feeds: list[dict[str, NDArray[np.float32]]], tmp_path: Path, run: Run, parse: Parse
) -> None:
    """Magnitudes of values and of channels, and the SQNR of a layer, are what numpy computes from the values."""
    path = written(network, tmp_path / "plain.onnx")
    shown = make_network(parse)
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


def test_ranges_leave_outliers_out(parse: Parse, tmp_path: Path) -> None:
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


# --- smoothing


def test_smoothing_keeps_products_and_raises_their_sqnr(
    network: ir.Graph, feeds: list[dict[str, NDArray[np.float32]]], tmp_path: Path, run: Run
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


# --- half precision

HALF = """
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


def in_half(parse: Parse) -> ir.Graph:
    graph = parse(HALF)
    for node in graph:
        node.name = str(node.outputs[0].name)
    return graph


def test_widened_graph_shows_what_half_precision_overflows_to(parse: Parse, run: Run) -> None:
    """In fp32 the values are as they would be; with roundings they are what fp16 holds, infinity among it."""
    x = np.array([1 / 3, 2.0], np.float32)
    exact, rounded = in_half(parse), in_half(parse)
    names = widen(exact)
    assert names == ["x", "constant", "large", "big", "less", "back", "y"]
    np.testing.assert_allclose(run(exact, {"x": x})["big"], (x * 300) ** 2, rtol=1e-6)
    np.testing.assert_allclose(run(exact, {"x": x})["y"], 1 + x, rtol=1e-6)
    assert widen(rounded, rounded=True) == names
    results = run(rounded, {"x": x})
    half = x.astype(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        big = (half * np.float16(300)) ** 2
        expected = (big / big + half).astype(np.float32)
    np.testing.assert_array_equal(results["big"], big.astype(np.float32))
    np.testing.assert_array_equal(results["y"], expected)
    assert np.isinf(results["big"][1])


def test_weights_that_are_widened_where_they_are_used(parse: Parse, run: Run) -> None:
    """The graph computes the same in fp32 while its weights stay half, each cast once for all who take it."""
    graph = parse("g (float16[n] x) => (float16[n] y) { a = Mul(x, w) y = Add(a, w) }")
    for node in graph:
        node.name = str(node.outputs[0].name)
    weight = np.array([1000.0], np.float16)
    value = ir.val("w", const_value=ir.tensor(weight, name="w"))
    graph.register_initializer(value)
    for node in graph:
        for place, taken in enumerate(node.inputs):
            if taken is not None and taken.name == "w":
                node.replace_input_with(place, value)
    widen(graph, weights=False)
    assert graph.initializers["w"].dtype == ir.DataType.FLOAT16
    assert [node.op_type for node in graph] == ["Cast", "Mul", "Add"]
    x = np.array([1 / 3, 2000.0], np.float32)
    np.testing.assert_allclose(run(graph, {"x": x})["y"], x * 1000 + 1000, rtol=1e-6)


def test_rounding_an_fp32_graph_leaves_out_what_is_named(network: ir.Graph, run: Run) -> None:
    """Every value and weight is rounded to bf16, but for those whose names begin as told, and the outputs."""
    x = np.random.default_rng(3).standard_normal((1, 4, 4, 4)).astype(np.float32)
    exact = run(network, {"x": x})["y"]
    round_values(network, ir.DataType.BFLOAT16, keep="q")
    assert 1e-4 < relative(exact, run(network, {"x": x})["y"]) < 2e-2
    assert not any(node.op_type == "Cast" and node.inputs[0] and node.inputs[0].name == "q" for node in network)


def test_island_computes_in_fp32_and_the_rest_stays_half(parse: Parse, run: Run) -> None:
    """What overflows runs in fp32 with those who take it; the others do not, and the graph computes what it should."""
    graph = in_half(parse)
    assert keep_fp32(graph, ["big"]) == 2
    x = np.array([1 / 3, 2.0], np.float16)
    results = run(graph, {"x": x})
    assert results["big"].dtype == np.float32
    np.testing.assert_allclose(results["big"], (x.astype(np.float32) * 300) ** 2, rtol=2e-3)
    np.testing.assert_allclose(results["y"].astype(np.float32), 1 + x.astype(np.float32), rtol=2e-3)
    assert results["y"].dtype == np.float16
    kept = {value.name: value.dtype for node in graph for value in node.outputs}
    assert kept["large"] == ir.DataType.FLOAT16
    assert kept["big"] == ir.DataType.FLOAT
    with pytest.raises(ValueError, match="computes 'nothing'"):
        keep_fp32(graph, ["nothing"])


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
