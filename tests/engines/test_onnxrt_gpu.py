"""ONNX Runtime's providers for GPUs, on a stand-in that claims a GPU and computes with the real CPU sessions."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from latentrt.engines import onnxrt_gpu
from latentrt.engines.device import DLPACK_CUDA, to_numpy
from latentrt.engines.errors import EngineError, EngineUnavailableError, TensorMismatchError
from latentrt.engines.onnxrt_gpu import PROVIDERS, OnnxRuntimeGpuEngine, OnnxRuntimeGpuOptions, OrtArray
from latentrt.engines.trt import kind as trt_kind
from latentrt.engines.trt.cuda import CudaDevice
from latentrt.runtime import Pipeline
from latentrt.runtime.components import engine_choice

CUDA = "CUDAExecutionProvider"
X = np.arange(6, dtype=np.float32).reshape(2, 3) / 10
W = np.ones((3, 2), np.float32)
ROWS = np.array([4, 5])


class Value:
    """An ``OrtValue`` that says that it is on a device."""

    def __init__(self, value: Any, device: str) -> None:
        self.value = value
        self.device = device

    def shape(self) -> Sequence[int]:
        return self.value.shape()

    def data_type(self) -> str:
        return self.value.data_type()

    def numpy(self) -> Any:
        return self.value.numpy()

    def data_ptr(self) -> int:
        return self.value.data_ptr()


class Binding:
    def __init__(self, session: Session) -> None:
        self.real = session.real.io_binding()
        self.log = session.log
        self.outputs: list[str] = []

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        self.log.append(("input", name, value.device, id(value)))
        self.real.bind_ortvalue_input(name, value.value)

    def bind_output(self, name: str, device_type: str = "cpu", device_id: int = 0) -> None:
        self.outputs.append(f"{device_type}:{device_id}")
        self.real.bind_output(name, "cpu", 0)

    def synchronize_inputs(self) -> None:
        self.real.synchronize_inputs()

    def synchronize_outputs(self) -> None:
        self.real.synchronize_outputs()

    def get_outputs(self) -> list[Value]:
        return [Value(value, device) for value, device in zip(self.real.get_outputs(), self.outputs, strict=True)]


@dataclass
class Node:
    op_type: str


@dataclass
class Part:
    ep_name: str
    nodes: list[Node]

    def get_nodes(self) -> list[Node]:
        return self.nodes


class Session:
    """A session on the CPU that says it is on what was asked for."""

    def __init__(self, ort: FakeOnnxRuntime, path: str, settings: Any, providers: Any, options: dict[str, Any]) -> None:
        self.ort, self.asked, self.options, self.log = ort, providers, options, ort.log
        self.settings = settings
        self.real = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        names = [each[0] if isinstance(each, tuple) else each for each in self.asked or self.ort.plugged]
        return [name for name in names if name in self.ort.starting] + ["CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Part]:
        return [Part(CUDA, [Node("MatMul")]), Part("CPUExecutionProvider", [Node(op) for op in self.ort.on_cpu])]

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding) -> None:
        self.real.run_with_iobinding(binding.real)


@dataclass
class FakeOnnxRuntime:
    """What the engine uses of ONNX Runtime, with providers as a test wants them."""

    available: list[str]
    starting: list[str]
    on_cpu: list[str] = field(default_factory=lambda: ["Shape", "Gather"])
    log: list[Any] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    plugged: list[str] = field(default_factory=list)
    preloaded: int = 0
    reachable: bool = True
    __version__: str = "1.31.0"

    def preload_dlls(self) -> None:
        self.preloaded += 1
        print("Failed to load libcudnn")

    def __hash__(self) -> int:
        return id(self)

    def get_available_providers(self) -> list[str]:
        return [*self.available, "CPUExecutionProvider"]

    def SessionOptions(self) -> Any:  # noqa: N802
        return onnxruntime.SessionOptions()

    def InferenceSession(self, path: str, settings: Any, providers: Any = None, **options: Any) -> Session:  # noqa: N802
        self.sessions.append(Session(self, path, settings, providers, options))
        return self.sessions[-1]

    @property
    def OrtValue(self) -> Any:  # noqa: N802
        def ortvalue_from_numpy(array: Any, device_type: str = "cpu", device_id: int = 0) -> Value:
            if device_type == "cuda" and not self.reachable:
                raise RuntimeError("Can't allocate memory on the device using this package of OnnxRuntime.")
            self.copies.append(device_type)
            copy = np.array(array) if device_type == "cuda" else array
            return Value(onnxruntime.OrtValue.ortvalue_from_numpy(copy), f"{device_type}:{device_id}")

        return types.SimpleNamespace(ortvalue_from_numpy=ortvalue_from_numpy)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    """A machine with a GPU and an ONNX Runtime that has all providers."""
    names = [provider.name for provider in PROVIDERS.values()]
    fake = FakeOnnxRuntime(names, list(names))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)  # type: ignore[misc]
    monkeypatch.setattr(onnxrt_gpu, "cuda_devices", lambda: (CudaDevice("NVIDIA Test", "sm_90"),))
    return fake


@pytest.mark.parametrize(
    ("engine", "asked"),
    [
        ("onnxruntime-cuda", [(CUDA, {"device_id": "0", "use_tf32": "0"})]),
        ("onnxruntime-tensorrt", [("TensorrtExecutionProvider", {"device_id": "0"}), (CUDA, {"device_id": "0"})]),
        ("onnxruntime-tensorrt-rtx", [("NvTensorRTRTXExecutionProvider", {"device_id": "0"})]),
    ],
)
def test_it_runs_on_what_was_asked_for(step: Path, gpu: FakeOnnxRuntime, engine: str, asked: Any) -> None:
    """The provider comes first, ONNX Runtime's own fall back is off, and results are right and on the GPU."""
    with OnnxRuntimeGpuEngine(step, engine) as opened:
        assert opened.label == f"unet ({engine})"
        assert opened.on_device
        outputs: Any = opened.run({"x": X, "w": W, "rows": ROWS})
        (session,) = gpu.sessions
        assert (session.asked, session.options) == (asked, {"enable_fallback": 0})
        assert session.settings.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
        assert list(outputs) == ["y", "same"]
        assert isinstance(outputs["y"], OrtArray)
        assert (outputs["y"].dtype, outputs["y"].shape) == (np.dtype("float32"), (2, 2))
        assert outputs["y"].value.device == "cuda:0"
        assert repr(outputs["y"]) == "OrtArray(float32[2, 2] on cuda:0)"
        assert outputs["y"].__dlpack_device__() == (DLPACK_CUDA, 0)
        np.testing.assert_allclose(outputs["y"].numpy(), np.tanh(X @ W), atol=1e-6)
        np.testing.assert_array_equal(outputs["same"].numpy(), ROWS)


def test_bound_inputs_go_to_the_gpu_once(step: Path, gpu: FakeOnnxRuntime) -> None:
    """Runs copy only what is fed; what is bound is the same value every time."""
    with OnnxRuntimeGpuEngine(step, "onnxruntime-cuda") as engine:
        engine.bind({"w": W, "rows": ROWS})
        assert gpu.copies == ["cuda"] * 2
        for _ in range(3):
            engine.run({"x": X})
        assert gpu.copies == ["cuda"] * 5
        assert len({place for _, name, _, place in gpu.log if name == "w"}) == 1
        assert {device for _, _, device, _ in gpu.log} == {"cuda:0"}
        engine.bind({"w": 2 * W})
        result: Any = engine.run({"x": X})["y"]
        np.testing.assert_allclose(result.numpy(), np.tanh(X @ (2 * W)), atol=1e-6)


def test_outputs_are_fed_again_without_a_copy(step: Path, gpu: FakeOnnxRuntime) -> None:
    """State that a run returned goes into the next one as it is."""
    with OnnxRuntimeGpuEngine(step, "onnxruntime-cuda") as engine:
        engine.bind({"x": X, "w": W})
        state: Any = engine.run({"rows": ROWS})["same"]
        copies = len(gpu.copies)
        again: Any = engine.run({"rows": state})["same"]
        engine.bind({"rows": again})
        third: Any = engine.run({})["same"]
        assert len(gpu.copies) == copies
        assert [place for _, name, _, place in gpu.log if name == "rows"][1:] == [id(state.value), id(again.value)]
        np.testing.assert_array_equal(third.numpy(), ROWS)


def test_outputs_in_numpy_where_that_is_asked_for(step: Path, gpu: FakeOnnxRuntime) -> None:
    """Without device outputs they are arrays of the caller's own."""
    with OnnxRuntimeGpuEngine(step, "onnxruntime-cuda", OnnxRuntimeGpuOptions(1, device_outputs=False)) as engine:
        assert not engine.on_device
        outputs = engine.run({"x": X, "w": W, "rows": ROWS})
        assert [type(array) for array in outputs.values()] == [np.ndarray] * 2
        assert all(array.flags.owndata for array in outputs.values())
        outputs["y"][:] = 0
        assert gpu.sessions[0].asked[0][1]["device_id"] == "1"
        assert {device for _, _, device, _ in gpu.log} == {"cuda:1"}


def test_arrays_of_another_device(step: Path, gpu: FakeOnnxRuntime) -> None:
    """What another engine keeps elsewhere comes by way of the host."""

    class Elsewhere:
        dtype, shape = np.dtype("float32"), (2, 3)

        def numpy(self) -> Any:
            return X

    first = OnnxRuntimeGpuEngine(step, "onnxruntime-cuda")
    second = OnnxRuntimeGpuEngine(step, "onnxruntime-cuda", OnnxRuntimeGpuOptions(1))
    with first, second:
        feeds: Any = {"x": Elsewhere(), "w": W, "rows": ROWS}
        results: Any = first.run(feeds)
        np.testing.assert_allclose(results["y"].numpy(), np.tanh(X @ W), atol=1e-6)
        gpu.log.clear()
        second.bind({"rows": results["same"]})
        again: Any = second.run({"x": X, "w": W})["same"]
        np.testing.assert_array_equal(again.numpy(), ROWS)
        assert {device for _, _, device, _ in gpu.log} == {"cuda:1"}


def test_names_and_shapes_are_checked_as_ever(step: Path, gpu: FakeOnnxRuntime) -> None:
    """A wrong name or shape is refused before anything is copied, a bound array's too."""
    with OnnxRuntimeGpuEngine(step, "onnxruntime-cuda") as engine:
        with pytest.raises(TensorMismatchError, match="unknown input 'z'"):
            engine.bind({"z": X})
        assert gpu.copies == []
        engine.bind({"x": X, "w": W.T})
        with pytest.raises(TensorMismatchError, match=r"input 'w' has shape \(2, 3\)"):
            engine.run({"rows": ROWS})


def test_libraries_from_packages_are_found(
    step: Path, gpu: FakeOnnxRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime looks for them once, and what it prints meanwhile stays out of our output."""
    for _ in range(2):
        with OnnxRuntimeGpuEngine(step, "onnxruntime-cuda"):
            assert gpu.preloaded == 1
    assert capsys.readouterr().out == ""
    assert callable(onnxruntime.preload_dlls)


def test_many_threads(step: Path, gpu: FakeOnnxRuntime) -> None:
    """Every run has its own binding; what a thread has bound is its own."""

    def work(number: int) -> Any:
        engine.bind({"x": X, "w": W * number})
        return engine.run({"rows": ROWS})["y"].numpy()  # type: ignore[attr-defined]

    with OnnxRuntimeGpuEngine(step, "onnxruntime-cuda") as engine, ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(work, range(12))):
            np.testing.assert_allclose(found, np.tanh(X @ (W * number)), atol=1e-6)


@pytest.mark.parametrize("engine", PROVIDERS)
def test_a_provider_that_is_not_there(step: Path, gpu: FakeOnnxRuntime, engine: str) -> None:
    """An ONNX Runtime for the CPU is refused with what to install, before a session is made."""
    gpu.available = []
    with pytest.raises(EngineUnavailableError, match=r"has no \w+ExecutionProvider; install .*pip install") as caught:
        OnnxRuntimeGpuEngine(step, engine).open()
    assert PROVIDERS[engine].install in str(caught.value)
    assert gpu.sessions == []


@pytest.mark.parametrize("engine", PROVIDERS)
def test_no_gpu(step: Path, gpu: FakeOnnxRuntime, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the sentence names the engine that runs instead."""
    monkeypatch.setattr(onnxrt_gpu, "cuda_devices", lambda: ())
    with pytest.raises(EngineUnavailableError, match=f"{engine} needs an NVIDIA GPU .*; use the engine onnxruntime$"):
        OnnxRuntimeGpuEngine(step, engine).open()


def test_a_provider_that_does_not_start(step: Path, gpu: FakeOnnxRuntime) -> None:
    """ONNX Runtime goes on with the CPU when libraries are missing; the engine does not."""
    gpu.starting = []
    with pytest.raises(EngineUnavailableError, match=f"could not start {CUDA} and took CPUExecutionProvider; .*cuDNN"):
        OnnxRuntimeGpuEngine(step, "onnxruntime-cuda").open()
    gpu.starting = [CUDA]
    with pytest.raises(EngineUnavailableError, match="could not start TensorrtExecutionProvider and took CUDA"):
        OnnxRuntimeGpuEngine(step, "onnxruntime-tensorrt").open()


def test_work_that_would_fall_back_to_the_cpu(step: Path, gpu: FakeOnnxRuntime) -> None:
    """Convolutions on the CPU are an error; arithmetic on shapes is at home there."""
    gpu.on_cpu = ["Conv", "Shape", "Attention", "Conv"]
    with pytest.raises(EngineUnavailableError, match=f"{CUDA} lacks Attention, Conv of this graph, .* on the CPU; "):
        OnnxRuntimeGpuEngine(step, "onnxruntime-cuda").open()


def test_a_session_that_fails(step: Path, gpu: FakeOnnxRuntime) -> None:
    """ONNX Runtime's own error is the cause of one sentence."""
    step.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"^unet \(onnxruntime-cuda\) could not load model.onnx: ") as caught:
        OnnxRuntimeGpuEngine(step, "onnxruntime-cuda").open()
    assert "onnxruntime" in type(caught.value.__cause__).__module__


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "memory of its own"])
def test_a_plugin_brings_tensorrt_rtx(
    step: Path,
    gpu: FakeOnnxRuntime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    shared: bool,
) -> None:
    """It is registered once, gets the machine's device, and is what runs; state stays there if its memory is shared."""
    name, registered, given = "NvTensorRTRTXExecutionProvider", [], []
    plugin: Any = types.SimpleNamespace(get_ep_name=lambda: name, get_library_path=lambda: "/lib/plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    gpu.available = []
    fake: Any = gpu
    fake.register_execution_provider_library = lambda *arguments: registered.append(arguments)
    fake.get_ep_devices = lambda: [types.SimpleNamespace(ep_name=each) for each in ("CPUExecutionProvider", name)]

    class Settings:
        def __init__(self) -> None:
            self.real = onnxruntime.SessionOptions()

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.real.add_session_config_entry(key, value)

        def add_provider_for_devices(self, devices: Any, options: Any) -> None:
            given.extend(device.ep_name for device in devices)
            gpu.plugged = [name]

    fake.SessionOptions = Settings
    fake.InferenceSession = lambda path, settings, **options: Session(gpu, path, settings.real, None, options)
    gpu.reachable = shared
    for _ in range(2):
        with OnnxRuntimeGpuEngine(step, "onnxruntime-tensorrt-rtx") as engine:
            assert engine.on_device == shared
            result = engine.run({"x": X, "w": W, "rows": ROWS})["y"]
            assert isinstance(result, OrtArray if shared else np.ndarray)
            np.testing.assert_allclose(to_numpy(result), np.tanh(X @ W), atol=1e-6)
    assert registered == [(name, "/lib/plugin.so")]
    assert given == [name] * 2
    assert set(gpu.copies) == {"cuda" if shared else "cpu"}
    assert {device for _, _, device, _ in gpu.log} == {"cuda:0" if shared else "cpu:0"}
    assert caplog.messages == [] if shared else all("slower" in message for message in caplog.messages)
    assert len(caplog.messages) == (0 if shared else 2)


def test_the_stand_in_has_the_real_names() -> None:
    """What the engine calls is there in onnxruntime itself, with the parameters that it is called with."""
    assert {*onnxruntime.get_all_providers()} >= {provider.name for provider in PROVIDERS.values()}
    parameters = {
        onnxruntime.OrtValue.ortvalue_from_numpy: ("numpy_obj", "device_type", "device_id"),
        onnxruntime.IOBinding.bind_ortvalue_input: ("name", "ortvalue"),
        onnxruntime.IOBinding.bind_output: ("name", "device_type", "device_id"),
        onnxruntime.InferenceSession.run_with_iobinding: ("iobinding",),
        onnxruntime.OrtValue.data_ptr: (),
    }
    for function, names in parameters.items():
        known = [name for name in inspect.signature(function).parameters if name != "self"]
        assert known[: len(names)] == list(names)
    for name in ("synchronize_inputs", "synchronize_outputs", "get_outputs"):
        assert callable(getattr(onnxruntime.IOBinding, name))
    for name in ("get_providers", "io_binding", "get_provider_graph_assignment_info"):
        assert callable(getattr(onnxruntime.InferenceSession, name))
    for name in ("register_execution_provider_library", "get_ep_devices", "get_available_providers"):
        assert callable(getattr(onnxruntime, name))
    assert callable(onnxruntime.SessionOptions.add_provider_for_devices)


def test_a_copy_that_fails(step: Path, gpu: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime says of a copy or a binding is the cause of one sentence."""

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("CUDA failure 700: an illegal memory access\nsomewhere")

    with OnnxRuntimeGpuEngine(step, "onnxruntime-cuda") as engine:
        result: Any = engine.run({"x": X, "w": W, "rows": ROWS})["y"]
        monkeypatch.setattr(Value, "numpy", fail)
        with pytest.raises(
            EngineError, match=r"on cuda:0\) could not be copied to the host: .* memory access$"
        ) as caught:
            result.numpy()
        assert isinstance(caught.value.__cause__, RuntimeError)
        monkeypatch.setattr(Binding, "bind_ortvalue_input", fail)
        with pytest.raises(EngineError, match=r"^unet \(onnxruntime-cuda\) failed: CUDA failure 700"):
            engine.run({"x": X, "w": W, "rows": ROWS})


def test_a_pipeline_on_the_provider(
    tiny_bundles: dict[str, Path], gpu: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Auto takes CUDA where there are no plans, and a whole request draws what the CPU draws."""
    for module in (engine_choice, trt_kind):
        monkeypatch.setattr(module, "cuda_devices", onnxrt_gpu.cuda_devices)
    with Pipeline.load(tiny_bundles["sd1"]) as pipe:
        choice = pipe.engine_choice
        assert choice.name == "onnxruntime-cuda"
        assert choice.reason == "the bundle has no plans for this NVIDIA Test, and ONNX Runtime CUDA needs none"
        assert set(choice.passed_over) == {"tensorrt", "tensorrt-rtx"}
        assert {session.asked[0][0] for session in gpu.sessions} == {CUDA}
        received = pipe("a red apple", steps=2, seed=7, guidance=4)
    monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime)
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime") as pipe:
        expected = pipe("a red apple", steps=2, seed=7, guidance=4)
    np.testing.assert_array_equal(received.latents, expected.latents)
    np.testing.assert_array_equal(received.images, expected.images)
