"""The OpenVINO engine against ONNX Runtime, on graphs made here."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from latentrt.engines import TensorSpec
from latentrt.engines.errors import (
    EngineClosedError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    TensorMismatchError,
)
from latentrt.engines.openvino.engine import OpenVinoEngine, OpenVinoOptions, load_core, load_sdk, require_precision

RNG = np.random.default_rng(0)
LINEAR = """
linear (float[batch, 6] x) => (float[batch, 5] y, int64[2] count, float[batch, 6] same) {
    w = Constant <value = float[6, 5] {
        1, 2, 3, 4, 5, 6, 7, 8, 9, 10, -1, -2, -3, -4, -5, 0.1, 0.2, 0.3, 0.4, 0.5, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1
    }> ()
    xw = MatMul(x, w)
    y = Tanh(xw)
    count = Shape(x)
    same = Identity(x)
}
"""


def save(path: Path, text: str) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """``y = tanh(x @ W)``, the shape of x, and x itself."""
    (tmp_path / "unet").mkdir()
    return save(tmp_path / "unet" / "model.onnx", LINEAR)


def test_it_computes_what_onnxruntime_computes(linear: Path) -> None:
    """Outputs are those of ONNX Runtime, by name, at several batch sizes."""
    session = onnxruntime.InferenceSession(str(linear), providers=["CPUExecutionProvider"])
    with OpenVinoEngine(linear) as engine:
        for batch in (1, 3, 17):
            x = RNG.standard_normal((batch, 6)).astype(np.float32)
            expected = session.run(["y", "count", "same"], {"x": x})
            outputs = engine.run({"x": x})
            assert list(outputs) == ["y", "count", "same"]
            for received, wanted in zip(outputs.values(), expected, strict=True):
                np.testing.assert_allclose(received, wanted, atol=1e-6)


def test_its_specs_are_the_graphs_or_the_manifests(linear: Path) -> None:
    """Without a manifest variable lengths get names of their own; with one they keep theirs."""
    with OpenVinoEngine(linear) as engine:
        assert [str(spec) for spec in engine.inputs.values()] == ["x: float32[x_0, 6]"]
    x, y = TensorSpec("x", "float32", ("batch", 6)), TensorSpec("y", "float32", ("batch", 5))
    with OpenVinoEngine(linear, specs=((x,), (y,))) as engine:
        assert (dict(engine.inputs), dict(engine.outputs)) == ({"x": x}, {"y": y})
        assert list(engine.run({"x": np.zeros((1, 6), np.float32)})) == ["y"]
    missing = TensorSpec("z", "float32", ("batch",))
    with pytest.raises(EngineError, match="has no tensor 'z'"):
        OpenVinoEngine(linear, specs=((x,), (missing,))).open()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("float", "float32"),
        ("float16", "float16"),
        ("int64", "int64"),
        ("int32", "int32"),
        ("int8", "int8"),
        ("uint8", "uint8"),
        ("bool", "bool"),
    ],
)
def test_every_element_type_passes_through(tmp_path: Path, kind: str, dtype: str) -> None:
    """An identity gives back each element type unchanged, a scalar's shape too."""
    text = f"same ({kind}[n, 2] x, {kind} s) => ({kind}[n, 2] y, {kind} t) {{ y = Identity(x) t = Identity(s) }}"
    x = np.array([[0, 1], [1, 0]], dtype)
    with OpenVinoEngine(save(tmp_path / "model.onnx", text)) as engine:
        assert engine.inputs["x"].dtype == dtype
        outputs = engine.run({"x": x, "s": np.array(1, dtype)})
        assert outputs["y"].dtype == dtype
        np.testing.assert_array_equal(outputs["y"], x)
        assert outputs["t"].shape == ()


def test_results_are_the_callers(linear: Path) -> None:
    """A later run does not change what an earlier one returned, nor does the caller's change the inputs."""
    with OpenVinoEngine(linear) as engine:
        x = RNG.standard_normal((2, 6)).astype(np.float32)
        first = engine.run({"x": x})
        kept = {name: array.copy() for name, array in first.items()}
        engine.run({"x": x + 1})
        for name, array in first.items():
            np.testing.assert_array_equal(array, kept[name])
            array[:] = 0
        np.testing.assert_array_equal(engine.run({"x": x})["y"], kept["y"])


def test_views_that_are_not_contiguous(linear: Path) -> None:
    """A slice of a larger array is read as what it is."""
    wide = RNG.standard_normal((3, 12)).astype(np.float32)
    with OpenVinoEngine(linear) as engine:
        np.testing.assert_array_equal(engine.run({"x": wide[:, ::2]})["same"], wide[:, ::2])


def test_many_threads_at_once(linear: Path) -> None:
    """Each thread gets its own results."""
    with OpenVinoEngine(linear, OpenVinoOptions(threads=1)) as engine:
        inputs = [np.full((1 + i % 3, 6), i / 10, np.float32) for i in range(40)]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda x: engine.run({"x": x})["same"], inputs))
    for x, received in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(received, x)


def test_closed_while_another_thread_runs(linear: Path) -> None:
    """Runs end with a result or say that the engine was closed; nothing else."""
    engine = OpenVinoEngine(linear, OpenVinoOptions(threads=1)).open()
    x, seen = np.zeros((1, 6), np.float32), []

    def work() -> None:
        try:
            while True:
                engine.run({"x": x})
        except Exception as error:  # noqa: BLE001
            seen.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.05)
    engine.close()
    for thread in threads:
        thread.join(20)
    assert [type(error) for error in seen] == [EngineClosedError] * 4


SIGNAL = """
import signal, sys
from pathlib import Path
from latentrt.engines.openvino.engine import OpenVinoEngine
with OpenVinoEngine(Path(sys.argv[1])):
    pass
signal.signal(signal.SIGINT, lambda *_: print("handled"))
signal.raise_signal(signal.SIGINT)
"""


def test_a_signal_after_closing_is_handled(linear: Path) -> None:
    """Ctrl-C after the last engine was closed does not end the process (OpenVINO's plugin takes the stack away)."""
    done = subprocess.run([sys.executable, "-c", SIGNAL, str(linear)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n")


def test_wrong_inputs_are_refused_before_openvino_sees_them(linear: Path) -> None:
    """Names, element types and shapes are checked like any engine's."""
    with OpenVinoEngine(linear) as engine:
        with pytest.raises(TensorMismatchError, match=r"unet \(openvino\): input 'x' is float64, expected float32"):
            engine.run({"x": np.zeros((1, 6))})
        with pytest.raises(TensorMismatchError, match=r"has shape \(1, 7\)"):
            engine.run({"x": np.zeros((1, 7), np.float32)})


def test_errors_of_openvino_are_one_sentence(tmp_path: Path) -> None:
    """What it cannot load, and what fails while it runs, names the engine; its own exception is the cause."""
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"^unet could not load model\.onnx: ") as caught:
        OpenVinoEngine(tmp_path / "model.onnx", label="unet").open()
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    adding = save(tmp_path / "add.onnx", "add (float[a] x, float[b] y) => (float[c] z) { z = Add(x, y) }")
    with OpenVinoEngine(adding, label="unet") as engine, pytest.raises(EngineError, match=r"^unet failed: ") as caught:
        engine.run({"x": np.zeros(2, np.float32), "y": np.zeros(3, np.float32)})
    assert "\n" not in str(caught.value)


def test_an_element_type_that_is_not_supported(tmp_path: Path) -> None:
    """A graph of doubles is refused by name, and the engine stays closed."""
    path = save(tmp_path / "model.onnx", "same (double[2] x) => (double[2] y) { y = Identity(x) }")
    engine = OpenVinoEngine(path)
    with pytest.raises(EngineError, match="tensor 'x' is of type f64, which is not supported"):
        engine.open()
    with pytest.raises(EngineClosedError):
        engine.run({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision is 'fp16', expected one of fp32, bf16"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": True}, "threads is True"),
        ({"threads": 5000}, "threads is 5000, expected 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """The value and what is expected are named."""
    with pytest.raises(InvalidRequestError, match=message):
        OpenVinoOptions(**options)


class Processor:
    """Stands for OpenVINO's Core on a processor with these abilities."""

    def __init__(self, *abilities: str) -> None:
        self.abilities = list(abilities)

    def get_property(self, device: str, name: str) -> list[str]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return self.abilities


def test_bf16_needs_a_processor_that_has_it() -> None:
    """OpenVINO itself would silently compute in fp32."""
    require_precision(Processor("FP32", "BF16"), "bf16")
    require_precision(Processor("FP32"), "fp32")
    with pytest.raises(EngineUnavailableError, match=r"no instructions for bf16 .*; choose precision fp32"):
        require_precision(Processor("FP32", "INT8"), "bf16")


def test_bf16_here(linear: Path) -> None:
    """It runs with bf16's accuracy where the processor has it, and is refused elsewhere."""
    engine = OpenVinoEngine(linear, OpenVinoOptions("bf16"))
    if "BF16" not in load_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineUnavailableError, match="no instructions for bf16"):
            engine.open()
        return
    x = RNG.standard_normal((2, 6)).astype(np.float32)
    with engine, OpenVinoEngine(linear) as exact:
        np.testing.assert_allclose(engine.run({"x": x})["y"], exact.run({"x": x})["y"], atol=0.05)


def test_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says what to install."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    for load in (load_sdk, load_core.__wrapped__):  # the core that is there already stays, as it must
        with pytest.raises(EngineUnavailableError, match=r'pip install "latentrt\[openvino\]"'):
            load()


def test_what_is_not_quantised_is_bf16_where_the_processor_has_it() -> None:
    """INT8 leaves the choice of the rest to the processor; other precisions are what they say."""
    hint = "INFERENCE_PRECISION_HINT"
    found = {
        (precision, has): OpenVinoOptions(precision).as_properties(has_bf16=has)[hint]
        for precision in ("fp32", "bf16", "int8")
        for has in (False, True)
    }
    assert found == {
        ("fp32", False): "f32",
        ("fp32", True): "f32",
        ("bf16", False): "bf16",  # refused before, see require_precision
        ("bf16", True): "bf16",
        ("int8", False): "f32",
        ("int8", True): "bf16",
    }


def test_other_weights_take_the_place_of_the_graphs_own(tmp_path: Path) -> None:
    """An engine opened with weights computes with them; one that the graph lacks is refused by name."""
    own = RNG.standard_normal((6, 5)).astype(np.float32)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> '
        "linear (float[batch, 6] x) => (float[batch, 5] y) { y = MatMul(x, w) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(own, "w"))
    onnx.save(model, tmp_path / "model.onnx")
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    with OpenVinoEngine(tmp_path / "model.onnx", weights={"w": own * 2}) as engine:
        np.testing.assert_allclose(engine.run({"x": x})["y"], x @ own * 2, rtol=1e-4, atol=1e-5)
    with pytest.raises(EngineError, match="no constant 'v' to put another in place of"):
        OpenVinoEngine(tmp_path / "model.onnx", weights={"v": own}).open()
