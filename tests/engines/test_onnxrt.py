"""The ONNX Runtime engine against onnxruntime itself, on graphs made here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines import TensorSpec
from latentrt.engines.errors import (
    EngineClosedError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    TensorMismatchError,
    translated,
)
from latentrt.engines.onnxrt import OnnxRuntimeEngine, OnnxRuntimeOptions, with_inputs

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((6, 5)).astype(np.float32)


def save(path: Path, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Any = ()) -> Path:
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def tensor(name: str, kind: int, shape: Sequence[int | str | None]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """``y = tanh(x @ W)`` and ``count``, the shape of x."""
    (tmp_path / "unet").mkdir()
    return save(
        tmp_path / "unet" / "model.onnx",
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Tanh", ["xw"], ["y"]),
            helper.make_node("Shape", ["x"], ["count"]),
        ],
        [tensor("x", TensorProto.FLOAT, ["batch", 6])],
        [tensor("y", TensorProto.FLOAT, ["batch", 5]), tensor("count", TensorProto.INT64, [2])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )


def test_it_computes_what_onnxruntime_computes(linear: Path) -> None:
    """Outputs are those of a plain session, by name, at several batch sizes."""
    session = onnxruntime.InferenceSession(str(linear), providers=["CPUExecutionProvider"])
    with OnnxRuntimeEngine(linear) as engine:
        for batch in (1, 3, 0):
            x = RNG.standard_normal((batch, 6)).astype(np.float32)
            expected = session.run(["y", "count"], {"x": x})
            outputs = engine.run({"x": x})
            assert list(outputs) == ["y", "count"]
            np.testing.assert_array_equal(outputs["y"], expected[0])
            np.testing.assert_array_equal(outputs["count"], expected[1])
            np.testing.assert_allclose(outputs["y"], np.tanh(x @ WEIGHT), atol=1e-6)


def test_its_specs_are_the_graphs(linear: Path) -> None:
    """Names, dtypes and symbols are read from the graph."""
    with OnnxRuntimeEngine(linear) as engine:
        assert [str(spec) for spec in engine.inputs.values()] == ["x: float32[batch, 6]"]
        assert [str(spec) for spec in engine.outputs.values()] == ["y: float32[batch, 5]", "count: int64[2]"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.FLOAT, "float32"),
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.INT64, "int64"),
        (TensorProto.INT32, "int32"),
        (TensorProto.INT8, "int8"),
        (TensorProto.UINT8, "uint8"),
        (TensorProto.BOOL, "bool"),
    ],
)
def test_every_element_type_passes_through(tmp_path: Path, kind: int, dtype: str) -> None:
    """An identity gives back each element type unchanged, a nameless dimension and a scalar's shape too."""
    path = save(
        tmp_path / "model.onnx",
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["s"], ["t"])],
        [tensor("x", kind, [None, 2]), tensor("s", kind, [])],
        [tensor("y", kind, [None, 2]), tensor("t", kind, [])],
    )
    x = np.array([[0, 1], [1, 0]], dtype)
    with OnnxRuntimeEngine(path) as engine:
        assert engine.inputs["x"].dtype == dtype
        assert engine.inputs["x"].shape == ("x_0", 2)
        outputs = engine.run({"x": x, "s": np.array(1, dtype)})
        assert outputs["y"].dtype == dtype
        np.testing.assert_array_equal(outputs["y"], x)
        assert outputs["t"].shape == ()


def test_an_element_type_that_is_not_supported(tmp_path: Path) -> None:
    """A graph of strings is refused by name, and the engine stays closed."""
    path = save(
        tmp_path / "model.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [tensor("x", TensorProto.STRING, [1])],
        [tensor("y", TensorProto.STRING, [1])],
    )
    engine = OnnxRuntimeEngine(path)
    with pytest.raises(EngineError, match=r"'x' is a tensor\(string\), which is not supported"):
        engine.open()
    with pytest.raises(EngineClosedError):
        engine.run({})


def test_external_data_is_found_beside_the_graph(linear: Path, tmp_path: Path) -> None:
    """Weights in a file of their own give the same result."""
    model = onnx.load(linear)
    apart = tmp_path / "apart" / "model.onnx"
    apart.parent.mkdir()
    onnx.save_model(model, apart, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert (apart.parent / "model.onnx_data").stat().st_size >= WEIGHT.nbytes
    x = np.ones((2, 6), np.float32)
    with OnnxRuntimeEngine(linear) as one, OnnxRuntimeEngine(apart) as other:
        np.testing.assert_array_equal(one.run({"x": x})["y"], other.run({"x": x})["y"])
    (apart.parent / "model.onnx_data").unlink()
    with pytest.raises(EngineError, match=r"apart \(onnxruntime\) could not load model.onnx"):
        OnnxRuntimeEngine(apart).open()


def test_other_weights_take_the_place_of_the_graphs_own(linear: Path, tmp_path: Path) -> None:
    """An engine opened with weights computes with them from the start; one that the graph lacks is refused by name."""
    model = onnx.load(linear)
    apart = tmp_path / "apart.onnx"
    onnx.save_model(model, apart, save_as_external_data=True, location="apart.data", size_threshold=0)
    other = (WEIGHT * 3 + 1).astype(np.float32)
    name = next(each.name for each in model.graph.initializer if list(each.dims) == list(WEIGHT.shape))
    for initializer in model.graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(numpy_helper.from_array(other, name))
    onnx.save(model, tmp_path / "expected.onnx")
    x = np.ones((2, 6), np.float32)
    with (
        OnnxRuntimeEngine(apart, weights={name: other}) as engine,
        OnnxRuntimeEngine(tmp_path / "expected.onnx") as expected,
        OnnxRuntimeEngine(apart) as own,
    ):
        result = engine.run({"x": x})["y"]
        np.testing.assert_array_equal(result, expected.run({"x": x})["y"])
        assert not np.array_equal(result, own.run({"x": x})["y"])
    for wrong in ({"none": other}, {name: other[:2]}):
        with pytest.raises(EngineError, match=r"could not load apart\.onnx"):
            OnnxRuntimeEngine(apart, weights=wrong).open()


def test_weights_are_exchanged_while_an_engine_is_open(linear: Path, tmp_path: Path) -> None:
    """The graph means to onnx what it meant, with its weights as inputs; each view computes with its own weights."""
    model = onnx.load(linear)
    apart = tmp_path / "apart" / "model.onnx"
    apart.parent.mkdir()
    onnx.save_model(model, apart, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    spec = TensorSpec("w", "float32", WEIGHT.shape)
    read = onnx.load_from_string(with_inputs(linear.read_bytes(), [spec]))
    onnx.checker.check_model(read)
    expected = onnx.load(linear)
    expected.graph.input.append(tensor("w", TensorProto.FLOAT, WEIGHT.shape))
    assert read == expected
    x, other = np.ones((2, 6), np.float32), (WEIGHT * 0.5 + 0.1).astype(np.float32)
    with OnnxRuntimeEngine(apart, exchangeable=[spec]) as engine, OnnxRuntimeEngine(linear) as plain:
        assert list(engine.inputs) == ["x"]
        changed, again = engine.with_weights({"w": other}).open(), engine.with_weights({"w": WEIGHT}).open()
        own = engine.run({"x": x})["y"]
        np.testing.assert_allclose(own, plain.run({"x": x})["y"], rtol=1e-6)
        np.testing.assert_allclose(changed.run({"x": x})["y"], np.tanh(x @ other), rtol=1e-5)
        np.testing.assert_array_equal(again.run({"x": x})["y"], own)
        changed.close()
        with pytest.raises(EngineClosedError):
            changed.run({"x": x})
        np.testing.assert_array_equal(engine.run({"x": x})["y"], own)
        for wrong in ({"v": other}, {"w": other[:2]}, {"w": other.astype(np.float16)}):
            with pytest.raises(TensorMismatchError, match=r"input '[vw]'"):
                engine.with_weights(wrong).open()
    with pytest.raises(EngineClosedError):
        again.run({"x": x})
    with pytest.raises(EngineError, match=r"model.onnx has no weights named 'v' of its own"):
        OnnxRuntimeEngine(apart, exchangeable=[TensorSpec("v", "float32", (1,))]).open()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "directory"])
def test_a_graph_that_cannot_be_loaded(linear: Path, damage: str) -> None:
    """One line names the engine and the file; onnxruntime's exception is the cause and nothing more."""
    content = linear.read_bytes()
    linear.unlink()
    if damage == "directory":
        linear.mkdir()
    elif damage != "missing":
        linear.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    engine = OnnxRuntimeEngine(linear)
    with pytest.raises(EngineError, match=r"^unet \(onnxruntime\) could not load model.onnx: \S") as caught:
        engine.open()
    assert "onnxruntime" in type(caught.value.__cause__).__module__
    assert "onnxruntime" not in type(caught.value).__module__
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineClosedError):
        engine.run({"x": np.zeros((1, 6), np.float32)})


def failing(tmp_path: Path) -> Path:
    """A graph that fails at run time: the element of ``x`` at ``index``."""
    return save(
        tmp_path / "model.onnx",
        [helper.make_node("Gather", ["x", "index"], ["y"])],
        [tensor("x", TensorProto.FLOAT, ["n"]), tensor("index", TensorProto.INT64, [1])],
        [tensor("y", TensorProto.FLOAT, [1])],
    )


def test_a_run_that_fails_leaves_the_engine_usable(tmp_path: Path) -> None:
    """onnxruntime's exception becomes the cause of an EngineError; the next run works."""
    x = np.array([4, 5], np.float32)
    with OnnxRuntimeEngine(failing(tmp_path), label="unet (onnxruntime)") as engine:
        with pytest.raises(EngineError, match=r"^unet \(onnxruntime\) failed: .*Gather") as caught:
            engine.run({"x": x, "index": np.array([7])})
        assert "onnxruntime" in type(caught.value.__cause__).__module__
        assert engine.run({"x": x, "index": np.array([1])})["y"] == 5


def test_wrong_feeds_never_reach_onnxruntime(linear: Path) -> None:
    """A wrong dtype or shape is our own error, without a cause from the SDK."""
    with OnnxRuntimeEngine(linear) as engine:
        with pytest.raises(TensorMismatchError, match="input 'x' is float64, expected float32") as caught:
            engine.run({"x": np.zeros((1, 6))})
        assert caught.value.__cause__ is None
        with pytest.raises(TensorMismatchError, match=r"unet \(onnxruntime\): input 'x' has shape \(1, 7\)"):
            engine.run({"x": np.zeros((1, 7), np.float32)})


def test_views_are_taken_as_they_are(linear: Path) -> None:
    """A transposed or strided array gives what its copy gives."""
    x = RNG.standard_normal((6, 8)).astype(np.float32)
    with OnnxRuntimeEngine(linear) as engine:
        np.testing.assert_array_equal(engine.run({"x": x.T})["y"], engine.run({"x": np.ascontiguousarray(x.T)})["y"])
        np.testing.assert_array_equal(
            engine.run({"x": x.T[::2]})["y"], engine.run({"x": np.ascontiguousarray(x.T[::2])})["y"]
        )


@pytest.mark.parametrize(("threads", "spinning", "arena"), [(0, True, True), (1, False, True), (2, True, False)])
def test_options_reach_the_session(linear: Path, threads: int, spinning: bool, arena: bool) -> None:
    """The session says that it has the threads, the spinning and the arena that were asked for."""
    with OnnxRuntimeEngine(linear, OnnxRuntimeOptions(threads, spinning, arena)) as engine:
        settings = engine._session.get_session_options()
        assert settings.intra_op_num_threads == threads
        assert settings.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spinning))
        assert settings.get_session_config_entry("session.force_spinning_stop") == "1"
        assert settings.enable_cpu_mem_arena is arena


@pytest.mark.parametrize("threads", [-1, 1.5, True, "2", 10**6])
def test_threads_out_of_range(threads: Any) -> None:
    """The number received and the range are named."""
    with pytest.raises(InvalidRequestError, match=r"threads is .*, expected 0 \(automatic\) to 1024"):
        OnnxRuntimeOptions(threads=threads)


def test_many_threads_share_one_engine(linear: Path) -> None:
    """Eight threads on one engine compute bit for bit what one computes."""
    inputs = [RNG.standard_normal((1 + i % 4, 6)).astype(np.float32) for i in range(64)]
    with OnnxRuntimeEngine(linear) as engine:
        serial = [engine.run({"x": x})["y"] for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            parallel = list(pool.map(lambda x: engine.run({"x": x})["y"], inputs))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one, other)


def test_closing_while_others_run_ends_in_our_errors(linear: Path) -> None:
    """Threads in the middle of runs either finish or are told that the engine is closed."""
    engine = OnnxRuntimeEngine(linear).open()
    started = threading.Barrier(5)

    def work() -> str:
        started.wait(10)
        for _ in range(100_000):
            try:
                engine.run({"x": np.zeros((1, 6), np.float32)})
            except EngineClosedError as error:
                return str(error)
        return "never closed"

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work) for _ in range(4)]
        started.wait(10)
        engine.close()
        messages = {future.result() for future in futures}
    assert messages <= {
        "unet (onnxruntime) is not open; call open() first, or use it in a with statement",
        "unet (onnxruntime) was closed while it was in use",
    }


def test_an_engine_opens_again(linear: Path) -> None:
    """Closing frees the session; opening makes another."""
    engine = OnnxRuntimeEngine(linear)
    for _ in range(2):
        with engine:
            assert engine.run({"x": np.zeros((1, 6), np.float32)})["y"].tolist() == [[0.0] * 5]
        assert engine._session is None


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch, linear: Path) -> None:
    """Where the package is missing, opening says how to install it; constructing still works."""
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    engine = OnnxRuntimeEngine(linear)
    with pytest.raises(EngineUnavailableError, match="pip install onnxruntime") as caught:
        engine.open()
    assert isinstance(caught.value.__cause__, ImportError)


def test_no_exception_escapes_translation() -> None:
    """Every exception class that onnxruntime defines, and any other, becomes an EngineError with itself as cause."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 5
    for kind in [*kinds, RuntimeError, ValueError, MemoryError]:
        with pytest.raises(EngineError, match=r"^unet failed: first$") as caught, translated("unet failed"):
            raise kind("first\nsecond")
        assert isinstance(caught.value.__cause__, kind)
    with pytest.raises(KeyboardInterrupt), translated("unet failed"):
        raise KeyboardInterrupt


def test_products_of_8_bits_do_not_overflow(tmp_path: Path) -> None:
    """A quantised product is what it is in exact arithmetic, on processors without VNNI too."""
    rng = np.random.default_rng(1)
    weights = rng.integers(-127, 128, (64, 32)).astype(np.int8)
    scales = rng.uniform(0.01, 0.02, 32).astype(np.float32)
    constants = {"s": np.float32(0.03), "z": np.int8(0), "w": weights, "ws": scales, "wz": np.zeros(32, np.int8)}
    path = save(
        tmp_path / "model.onnx",
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], axis=1),
            helper.make_node("MatMul", ["d", "dw"], ["y"]),
        ],
        [tensor("x", TensorProto.FLOAT, ["batch", 64])],
        [tensor("y", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    x = rng.standard_normal((4, 64)).astype(np.float32)
    expected = (np.rint(x / np.float32(0.03)).clip(-128, 127) * 0.03) @ (weights * scales.astype(np.float64))
    with OnnxRuntimeEngine(path) as engine:
        received = engine.run({"x": x})["y"]
    assert np.linalg.norm(received - expected) < 1e-5 * np.linalg.norm(expected)
