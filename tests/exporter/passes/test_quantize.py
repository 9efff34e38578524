"""Quantised graphs against ONNX Runtime's quantiser, and against the graph before."""

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

from latentrt.exporter.passes.quantize import FORMATS, find_layers, quantize, quantized_share, representable
from latentrt.exporter.precision.observe import largest_magnitudes

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


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
    network: ir.Graph,
    feeds: list[dict[str, NDArray[np.float32]]],
    tmp_path: Path,
    parse: Parse,
    make_network: Callable[[], ir.Graph],
    written: Callable[[ir.Graph, Path], Path],
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
    ours = make_network()
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
    network: ir.Graph,
    feeds: list[dict[str, NDArray[np.float32]]],
    tmp_path: Path,
    run: Run,
    name: str,
    error: float,
    written: Callable[[ir.Graph, Path], Path],
    relative: Callable[[NDArray[Any], NDArray[Any]], float],
) -> None:
    """Rounding to 8 bits shows, and no more than its steps explain."""
    path = written(network, tmp_path / "plain.onnx")
    expected = run(network, feeds[0])["y"]
    ranges = largest_magnitudes(path, [layer.activation for layer in find_layers(network)], feeds)
    quantize(network, FORMATS[name], ranges)
    assert find_layers(network) == []
    assert 1e-4 < relative(expected, run(network, feeds[0])["y"]) < error
    assert not {"kernel", "matrix", "turned"} & set(network.initializers)


def test_weights_alone(
    network: ir.Graph,
    feeds: list[dict[str, NDArray[np.float32]]],
    run: Run,
    relative: Callable[[NDArray[Any], NDArray[Any]], float],
) -> None:
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
