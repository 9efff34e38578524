"""Convolution by tiles in OpenVINO models: the results are those of ONNX Runtime on the graph as it was."""

from __future__ import annotations

import functools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from latentrt.engines.openvino import engine as ov
from latentrt.engines.openvino import rewrite as ov_rewrite
from latentrt.engines.openvino import winograd as ov_winograd
from latentrt.engines.openvino.engine import OpenVinoEngine, OpenVinoOptions, load_sdk, read_onnx
from latentrt.engines.openvino.winograd import CHANNELS, convolve_by_tiles, largest_tile, transforms

RNG = np.random.default_rng(0)
Array = NDArray[Any]
Lengths = tuple[int | str, int | str]


def kernel(outputs: int, inputs: int, taps: int = 3) -> Array:
    """Weights that keep the size of numbers about as it is."""
    return (RNG.standard_normal((outputs, inputs, taps, taps)) / np.sqrt(taps * taps * inputs)).astype(np.float32)


def convolution(path: Path, weights: Array, lengths: Lengths, **attributes: Any) -> Path:
    """A graph of one convolution with a bias."""
    outputs, inputs = weights.shape[:2]
    kind = helper.np_dtype_to_tensor_dtype(weights.dtype)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **{"pads": [1, 1, 1, 1], **attributes})
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", kind, ["batch", inputs * attributes.get("group", 1), *lengths])],
        [helper.make_tensor_value_info("y", kind, [None] * 4)],
        [
            numpy_helper.from_array(weights, "w"),
            numpy_helper.from_array(np.linspace(-1, 1, outputs).astype(weights.dtype), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def expected(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def received(path: Path, x: Array, precision: str = "fp32") -> Array:
    with OpenVinoEngine(path, OpenVinoOptions(precision)) as engine:
        return next(iter(engine.run({"x": x}).values()))


def take_all(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Compute convolutions of any size by tiles."""
    by_tiles = functools.partial(convolve_by_tiles, largest=tile, channels=1, tiles=1)
    monkeypatch.setattr(ov, "rewrite", lambda model, sdk, _: by_tiles(model, sdk))


def points(path: Path, largest: int = 4, **fewest: int) -> int:
    """Products of a tile, which are the convolutions of one pixel that the model comes to have; 0 for none."""
    model = read_onnx(path)
    count = convolve_by_tiles(model, load_sdk(), largest=largest, **fewest)
    kernels = [
        list(node.get_input_shape(1))[2:] for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"
    ]
    assert kernels.count([1, 1]) == (len(kernels) if count else 0)
    return len(kernels) * count


@pytest.mark.parametrize("tile", [2, 4])
def test_matrices_give_a_convolution(tile: int) -> None:
    """Along one dimension, the transforms come to a plain convolution of a tile, for any pixels and kernel."""
    by = transforms(tile)
    for _ in range(10):
        taps, pixels = RNG.standard_normal(3), RNG.standard_normal(tile + 2)
        found = by.results @ ((by.kernel @ taps) * (by.pixels @ pixels))
        np.testing.assert_allclose(found, np.correlate(pixels, taps, "valid"), atol=1e-12)


def test_points_of_large_tiles_round_less_than_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is stored rounded to half precision, the error is about half."""

    def error() -> float:
        random, by = np.random.default_rng(0), transforms.__wrapped__(4)
        pixels, kernels = random.standard_normal((64, 256, 6, 6)), random.standard_normal((32, 256, 3, 3))
        exact = np.zeros((64, 32, 4, 4))
        for row, column in np.ndindex(4, 4):
            window = pixels[:, :, row : row + 3, column : column + 3]
            exact[:, :, row, column] = np.einsum("tcij,ocij->to", window, kernels)
        shown, stored = (
            np.einsum("ik,jl,tckl->ijtc", matrix, matrix, values).astype(np.float16).astype(np.float64)
            for matrix, values in ((by.pixels, pixels), (by.kernel, kernels))
        )
        products = (shown @ stored.swapaxes(2, 3)).astype(np.float16).astype(np.float64)
        found = np.einsum("ai,bj,ijto->toab", by.results, by.results, products)
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    ours = error()
    monkeypatch.setitem(ov_winograd._POINTS, 4, tuple(map(Fraction, (0, 1, -1, 2, -2))))
    assert 0 < ours < 0.6 * error()


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (7, 9), (6, 5), (1, 2), (1, 1), (13, 10), (3, 16)])
def test_pictures_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], known: bool, tile: int
) -> None:
    """Tiles may divide the picture or not, and edges are right in both."""
    take_all(monkeypatch, tile)
    path = convolution(tmp_path / "m.onnx", kernel(6, 5), size if known else ("height", "width"))
    assert points(path, tile, channels=1, tiles=1) == (tile + 2) ** 2
    x = RNG.standard_normal((2, 5, *size)).astype(np.float32)
    np.testing.assert_allclose(received(path, x), expected(path, x), atol=1e-5)


def test_one_model_takes_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was compiled without a size takes one after the other, with any number of pictures."""
    take_all(monkeypatch, 4)
    path = convolution(tmp_path / "m.onnx", kernel(6, 5), ("height", "width"))
    with OpenVinoEngine(path) as engine:
        for shape in ((1, 5, 8, 8), (3, 5, 7, 4), (1, 5, 2, 9)):
            x = RNG.standard_normal(shape).astype(np.float32)
            np.testing.assert_allclose(next(iter(engine.run({"x": x}).values())), expected(path, x), atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "lengths", "largest", "wanted"),
    [
        ((CHANNELS, CHANNELS), (32, 32), 4, 36),
        ((CHANNELS, CHANNELS), (32, 28), 4, 16),  # 56 tiles of 4, so tiles of 2
        ((CHANNELS, CHANNELS), (32, 32), 2, 16),
        ((CHANNELS, CHANNELS), (16, 14), 4, 0),  # 56 tiles of 2
        ((CHANNELS, CHANNELS - 1), (32, 32), 4, 0),
        ((4, 4 * CHANNELS), (32, 32), 4, 0),
        ((CHANNELS, CHANNELS), ("height", "width"), 4, 36),
        ((CHANNELS, CHANNELS), ("height", "width"), 2, 16),
        ((1024, 1024), ("height", "width"), 4, 0),
    ],
)
def test_only_where_it_is_worth_it(
    tmp_path: Path, channels: tuple[int, int], lengths: Lengths, largest: int, wanted: int
) -> None:
    """The number of channels and of tiles decides, and the largest tile that is allowed."""
    weights = np.zeros((*channels, 3, 3), np.float32)
    assert points(convolution(tmp_path / "m.onnx", weights, lengths), largest) == wanted


@pytest.mark.parametrize(
    ("taps", "attributes"),
    [
        (3, {"strides": [2, 2]}),
        (3, {"pads": [0, 0, 0, 0]}),
        (3, {"dilations": [2, 2]}),
        (3, {"group": 2}),
        (1, {"pads": [0, 0, 0, 0]}),
        (5, {"pads": [2, 2, 2, 2]}),
    ],
)
def test_other_convolutions_are_left(tmp_path: Path, taps: int, attributes: dict[str, Any]) -> None:
    """Only kernels of 3x3 with a pixel of padding, that skip nothing, are taken."""
    path = convolution(tmp_path / "m.onnx", kernel(6, 4, taps), (8, 8), **attributes)
    assert convolve_by_tiles(read_onnx(path), load_sdk(), largest=4, channels=1, tiles=1) == 0


def test_weights_that_are_not_fp32_are_left(tmp_path: Path) -> None:
    """Transformed kernels would be rounded to fp16 once more."""
    path = convolution(tmp_path / "m.onnx", kernel(6, 4).astype(np.float16), (8, 8))
    assert points(path, channels=1, tiles=1) == 0


def test_full_size_keeps_the_precision_of_fp32(tmp_path: Path) -> None:
    """With as many channels as a model has, tiles of 4 stay near the rounding of fp32."""
    path = convolution(tmp_path / "m.onnx", kernel(320, 640), (32, 32))
    assert points(path) == 36
    x = RNG.standard_normal((1, 640, 32, 32)).astype(np.float32)
    wanted, found = expected(path, x), received(path, x)
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.skipif(not ov.has_bf16(ov.load_core()), reason="this processor has no bf16")
def test_bf16_takes_small_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding loses is a few times what bf16 itself does."""
    monkeypatch.setattr(ov_rewrite, "largest_tile", {"bf16": 2}.__getitem__)
    path = convolution(tmp_path / "m.onnx", kernel(320, 320), (32, 32))
    x = RNG.standard_normal((1, 320, 32, 32)).astype(np.float32)
    wanted, found = expected(path, x), received(path, x, "bf16")
    with OpenVinoEngine(path, OpenVinoOptions("bf16")) as engine:
        layers = [
            node.get_rt_info()["layerType"].astype(str) for node in engine.opened.model.get_runtime_model().get_ops()
        ]
    assert layers.count("Convolution") == 16 + 16  # that transform pixels, and that multiply them
    assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.01


def test_weights_that_were_exchanged_are_transformed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights put in place of a graph's own count, not those."""
    take_all(monkeypatch, 4)
    path, other = convolution(tmp_path / "m.onnx", kernel(6, 5), (8, 8)), kernel(6, 5)
    wanted = convolution(tmp_path / "other.onnx", other, (8, 8))
    x = RNG.standard_normal((1, 5, 8, 8)).astype(np.float32)
    with OpenVinoEngine(path, weights={"w": other}) as engine:
        np.testing.assert_allclose(next(iter(engine.run({"x": x}).values())), expected(wanted, x), atol=1e-5)


@pytest.mark.parametrize(
    ("machine", "flags", "computed_in", "tile"),
    [
        ("x86_64", "avx2 avx512f", "fp32", 4),
        ("AMD64", "avx512_bf16", "bf16", 2),
        ("x86_64", "avx512_bf16 amx_bf16 amx_tile", "bf16", 0),
        ("x86_64", "avx512_bf16 amx_bf16 amx_tile", "fp32", 4),
        ("x86_64", None, "bf16", 2),
        ("aarch64", "asimd bf16", "fp32", 0),
    ],
)
def test_processors_that_were_not_measured_compute_plain_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, computed_in: str, tile: int
) -> None:
    """Of x86-64, bf16 with AMX is left, and all other processors."""
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n")
    monkeypatch.setattr(ov_winograd, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(ov_winograd.platform, "machine", lambda: machine)
    assert largest_tile(computed_in) == tile


def test_no_tile_leaves_all(tmp_path: Path) -> None:
    """With 0, nothing changes."""
    for name, lengths in (("known", (8, 8)), ("unknown", ("height", "width"))):
        path = convolution(tmp_path / f"{name}.onnx", kernel(6, 4), lengths)
        assert points(path, 0, channels=1, tiles=1) == 0
