"""Engines on a make-believe GPU: which GPU they open on, results, bound inputs and closing. No SDK is needed."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.device import DeviceArray
from latentrt.engines.errors import (
    EngineClosedError,
    EngineUnavailableError,
    TensorMismatchError,
)
from latentrt.engines.trt import SessionOptions, TensorRTEngine, session


@pytest.fixture
def unopened() -> TensorRTEngine:
    return TensorRTEngine(Path("unet.plan"), engine="tensorrt-rtx", target="sm_80+")


def test_opening_without_a_gpu(unopened: TensorRTEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU opening says in one sentence that none was found, what the plan is for, and what to do."""
    monkeypatch.setattr(session, "cuda_devices", lambda: ())
    with pytest.raises(EngineUnavailableError) as caught:
        unopened.open()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("unet.plan", "no CUDA device was found", "sm_80+", "machine with an NVIDIA GPU"):
        assert part in message
    with pytest.raises(EngineClosedError):
        unopened.run({})


@pytest.mark.parametrize(
    ("target", "fits"),
    [
        ("sm_80+", True),
        ("sm_90+", True),
        ("sm_100+", False),
        ("sm_90", True),
        ("sm_89", False),
        ("sm_86,sm_90", True),
        ("sm_86,sm_89", False),
        ("no target", False),
    ],
)
def test_a_plan_for_another_gpu(gpu: Any, target: str, fits: bool) -> None:
    """A plan that was built for other architectures is refused before any SDK is loaded, with both named."""
    engine = TensorRTEngine(gpu.plan(), engine=gpu.sdk.name, target=target)
    if fits:
        engine.open().close()
        return
    with pytest.raises(
        EngineUnavailableError, match=rf"was built for {target.replace('+', '.')} and cannot run on H100"
    ):
        engine.open()
    assert gpu.cuda.calls == {}


def test_a_device_that_is_not_there(gpu: Any) -> None:
    """The number of a device that does not exist is refused."""
    with pytest.raises(EngineUnavailableError, match=r"on device 3: there are 1, numbered from 0"):
        gpu.engine(options=SessionOptions(device=3)).open()


# --- results


def test_results(gpu: Any, engine: TensorRTEngine) -> None:
    """Outputs are arrays on the device with the right values, run after run and shape after shape."""
    for number, (rows, columns) in enumerate([(2, 8), (2, 8), (4, 16), (1, 64), (2, 8), (2, 8), (2, 8), (2, 8)]):
        feeds = gpu.feeds(rows, columns, seed=number)
        outputs = engine.run(feeds)
        assert all(isinstance(array, DeviceArray) for array in outputs.values())
        gpu.check(outputs, feeds)


def test_inputs_that_are_not_contiguous(gpu: Any, engine: TensorRTEngine) -> None:
    """Transposed and strided inputs are taken as they read."""
    feeds = gpu.feeds(4, 8)
    feeds["x"] = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32).T[::2]
    gpu.check(engine.run(feeds), feeds)


def test_outputs_outlive_later_runs_and_the_engine(gpu: Any) -> None:
    """An array keeps its values for as long as it is held, whatever runs later, and gives its memory back after."""
    with gpu.engine() as engine:
        feeds = [gpu.feeds(2, 8, seed=seed) for seed in range(6)]
        outputs = [engine.run(each) for each in feeds]
        for each, given in zip(outputs, feeds, strict=True):
            gpu.check(each, given)
    for each, given in zip(outputs, feeds, strict=True):
        gpu.check(each, given)
    assert gpu.cuda.leaks == {"device": 6}
    del outputs, each
    gc.collect()
    assert gpu.cuda.leaks == {}


def test_memory_of_outputs_is_used_again(gpu: Any, engine: TensorRTEngine) -> None:
    """A loop that drops its results allocates nothing after the first runs."""
    feeds = gpu.feeds()
    for _ in range(3):
        engine.run(feeds)
    before = gpu.cuda.calls["cudaMalloc"]
    for _ in range(20):
        engine.run(feeds)
    assert gpu.cuda.calls["cudaMalloc"] == before


def test_device_arrays_are_taken_without_the_host(gpu: Any, engine: TensorRTEngine) -> None:
    """What an engine handed out goes in again with a copy on the device only."""
    feeds = gpu.feeds()
    state, expected = feeds["x"], feeds["x"]
    kinds: list[int] = []
    copy = gpu.cuda.cudaMemcpyAsync
    gpu.cuda.cudaMemcpyAsync = lambda *arguments: (kinds.append(arguments[3]), copy(*arguments))[1]
    engine.bind({"text": feeds["text"], "rows": feeds["rows"]})
    kinds.clear()
    for step in range(5):
        state = engine.run({"x": state})["y"]
        expected = gpu.expected(feeds | {"x": expected})
        host_to_device = kinds.count(gpu.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
        assert host_to_device == 1, f"only the first state came from the host (step {step})"
    assert gpu.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost not in kinds
    np.testing.assert_allclose(state.numpy(), expected, rtol=1e-5)


def test_arrays_of_elsewhere_are_refused(gpu: Any, engine: TensorRTEngine) -> None:
    """Arrays of other devices or of no kind that is known are refused by name, never copied silently."""
    feeds = gpu.feeds()
    array = engine.run(feeds)["y"]
    array.cuda = type(array.cuda)(gpu.cuda, ordinal=1)
    with pytest.raises(TensorMismatchError, match="'x' is a CudaArray of another device, expected a numpy array or"):
        engine.run(feeds | {"x": array})
    with pytest.raises(TensorMismatchError, match="'text' is a list"):
        engine.bind({"text": [[1.0, 2.0, 3.0]]})
    array.cuda = engine._opened_plan().cuda


# --- bound inputs


def test_bound_inputs_stay(gpu: Any, engine: TensorRTEngine) -> None:
    """Bound inputs are copied once, used by every run, overridden for one run, and replaced when bound again."""
    feeds = gpu.feeds()
    text = feeds["text"].copy()
    engine.bind({"text": text, "rows": feeds["rows"]})
    text[:] = 99  # the engine has its own copy
    for seed in range(4):
        x = gpu.feeds(seed=seed)["x"]
        gpu.check(engine.run({"x": x}), feeds | {"x": x})
    other = feeds | {"text": np.full((1, 3), 5, np.float32)}
    gpu.check(engine.run({"x": feeds["x"], "text": other["text"]}), other)
    gpu.check(engine.run({"x": feeds["x"]}), feeds)
    engine.bind({"text": other["text"]})
    gpu.check(engine.run({"x": feeds["x"]}), other)
    engine.bind({"rows": np.array([1, 1, 0])})
    gpu.check(engine.run({"x": feeds["x"]}), other | {"rows": np.array([1, 1, 0])})


def test_binding_a_device_array_does_not_write_to_it(gpu: Any, engine: TensorRTEngine) -> None:
    """An array of the caller's that is bound is used where it is; what is bound next does not overwrite it."""
    feeds = gpu.feeds(rows=2)
    x = engine.run(feeds)["y"]
    values = x.numpy()
    engine.bind({"x": x, "text": feeds["text"], "rows": feeds["rows"]})
    gpu.check(engine.run({}), feeds | {"x": values})
    engine.bind({"x": feeds["x"]})
    gpu.check(engine.run({}), feeds)
    np.testing.assert_array_equal(x.numpy(), values)


def test_binding_is_a_threads_own(gpu: Any, engine: TensorRTEngine) -> None:
    """Threads bind and run at the same time, each with its own values."""

    def work(seed: int) -> None:
        feeds = gpu.feeds(2, 8 if seed % 2 else 32, seed=seed)
        engine.bind({"text": feeds["text"], "rows": feeds["rows"]})
        for number in range(12):
            x = gpu.feeds(2, feeds["x"].shape[1], seed=100 * seed + number)["x"]
            gpu.check(engine.run({"x": x}), feeds | {"x": x})

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, seed) for seed in range(8)]:
            done.result()


def test_names_that_are_no_inputs(gpu: Any, engine: TensorRTEngine) -> None:
    """Binding or feeding an unknown name, another type or another shape is refused before CUDA is called."""
    feeds = gpu.feeds()
    before = gpu.cuda.calls.copy()
    for wrong, message in (
        ({"z": feeds["x"]}, "unknown input 'z'"),
        ({"x": feeds["x"].astype(np.float64)}, "'x' is float64, expected float32"),
        ({"text": np.zeros((2, 3), np.float32)}, r"'text' has shape \(2, 3\)"),
    ):
        with pytest.raises(TensorMismatchError, match=message):
            engine.run(feeds | wrong)
    with pytest.raises(TensorMismatchError, match="unknown input 'z'"):
        engine.bind({"z": feeds["x"]})
    assert gpu.cuda.calls == before


def test_time_on_the_device(gpu: Any, engine: TensorRTEngine) -> None:
    """Where a list is given, each run appends what the device took, graphs included."""
    engine.device_seconds = seconds = []
    gpu.module.slow = 0.002
    for _ in range(3):
        engine.run(gpu.feeds())
    assert len(seconds) == 3
    assert all(0.002 <= each < 1 for each in seconds)
    engine.device_seconds = None
    engine.run(gpu.feeds())
    assert len(seconds) == 3


# --- closing


def test_closing(gpu: Any) -> None:
    """Closing twice is fine, running afterwards is refused, and opening again works."""
    engine = gpu.engine().open()
    feeds = gpu.feeds()
    for _ in range(3):
        engine.run(feeds)
    engine.bind({"text": feeds["text"]})
    engine.close()
    engine.close()
    gc.collect()
    assert gpu.cuda.leaks == {}
    for use in (lambda: engine.run(feeds), lambda: engine.bind({}), lambda: engine.memory, lambda: engine.refit({})):
        with pytest.raises(EngineClosedError):
            use()
    with engine:
        gpu.check(engine.run(feeds), feeds)


def test_closing_waits_for_runs(gpu: Any) -> None:
    """A run that is under way ends well while the engine is closed; those that come later are refused."""
    gpu.module.slow = 0.05
    engine = gpu.engine().open()
    feeds = gpu.feeds()
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(engine.run, feeds) for _ in range(3)]
        while not gpu.cuda.calls["cudaStreamSynchronize"]:
            time.sleep(0.001)
        engine.close()
        ended = 0
        for each in running:
            try:
                gpu.check(each.result(), feeds)
                ended += 1
            except EngineClosedError:
                pass
    assert ended >= 1


def test_closing_on_a_lost_device(gpu: Any) -> None:
    """Closing does not raise where the device is lost."""
    engine = gpu.engine().open()
    engine.run(gpu.feeds())
    gpu.cuda.failures["cudaSetDevice"] = gpu.fakes.CudaError.cudaErrorIllegalAddress
    engine.close()
    gc.collect()
    assert gpu.cuda.leaks == {}
