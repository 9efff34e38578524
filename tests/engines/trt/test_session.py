"""Plans on a make-believe GPU, through session.py, plan.py, context.py, cudart.py and cuda.py.

Plans on a make-believe GPU: results, buffers, threads, profiles, CUDA graphs, failures. No SDK is needed.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines import TensorSpec
from latentrt.engines.device import DeviceArray
from latentrt.engines.errors import (
    EngineClosedError,
    EngineError,
    EngineMemoryError,
    EngineUnavailableError,
    InvalidRequestError,
    TensorMismatchError,
)
from latentrt.engines.trt import SessionOptions, TensorRTEngine, session
from latentrt.engines.trt.cuda import CudaDevice, cuda_devices

SIGNATURE = (
    [
        TensorSpec("x", "float32", ("batch", "columns")),
        TensorSpec("text", "float32", (1, 3)),
        TensorSpec("rows", "int64", ("rows",)),
    ],
    [TensorSpec("y", "float32", ("batch", "columns")), TensorSpec("picked", "float16", ("rows", "columns"))],
)


@pytest.fixture
def engine(gpu: Any) -> Iterator[TensorRTEngine]:
    """An open engine of the small plan."""
    with gpu.engine() as opened:
        yield opened


def check(gpu: Any, outputs: dict[str, Any], feeds: dict[str, Any], **weights: float) -> None:
    expected = gpu.expected(feeds, **weights)
    np.testing.assert_allclose(outputs["y"].numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(outputs["picked"].numpy(), outputs["y"].numpy()[feeds["rows"]].astype(np.float16))


# --- opening


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


@pytest.mark.parametrize("options", [{"device": -1}, {"contexts": 0}, {"weight_streaming_budget": -1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    """Options out of range are refused when they are made."""
    with pytest.raises(InvalidRequestError, match="expected"):
        SessionOptions(**options)


def test_a_plan_of_another_version(gpu: Any) -> None:
    """A plan that the SDK does not read is one sentence with its reason and the way out; nothing stays behind."""
    gpu.module.failures["deserialize_cuda_engine"] = "expecting library version 10.99 got 10.3"
    with pytest.raises(EngineUnavailableError) as caught:
        gpu.engine().open()
    message = str(caught.value)
    assert "read unet.plan on H100: expecting library version 10.99 got 10.3; build the bundle again" in message
    assert "\n" not in message


def test_a_plan_that_is_gone(gpu: Any) -> None:
    """A file that cannot be read is named."""
    with pytest.raises(EngineError, match=r"cannot read .*absent\.plan: No such file"):
        gpu.engine(gpu.directory / "absent.plan").open()


def test_signature_names_the_dimensions(gpu: Any) -> None:
    """With the graph's specs, inputs that share a length are checked before the SDK sees them."""
    with gpu.engine(signature=SIGNATURE) as engine:
        assert engine.inputs == {spec.name: spec for spec in SIGNATURE[0]}
        assert engine.outputs == {spec.name: spec for spec in SIGNATURE[1]}
    with gpu.engine() as engine:
        assert engine.inputs["x"].shape == ("x_0", "x_1")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([*SIGNATURE[0][:2], TensorSpec("row", "int64", ("rows",))], "has no 'row', its graph row"),
        (
            [*SIGNATURE[0][:2], TensorSpec("rows", "int32", ("rows",))],
            r"has rows: int64\[rows_0\], its graph rows: int32",
        ),
        ([*SIGNATURE[0][:1], TensorSpec("text", "float32", (1, 4)), SIGNATURE[0][2]], r"has text: float32\[1, 3\]"),
        (SIGNATURE[0][:2], "has a tensor 'rows' that its graph does not have"),
    ],
    ids=["name", "type", "length", "extra"],
)
def test_a_plan_of_another_graph(gpu: Any, inputs: list[TensorSpec], message: str) -> None:
    """A plan whose tensors are not the graph's is refused."""
    with pytest.raises(EngineError, match=message):
        gpu.engine(signature=(inputs, SIGNATURE[1])).open()


def test_tensors_that_cannot_be_fed(gpu: Any) -> None:
    """Shapes that the plan reads on the host, and element types without a numpy one, are refused by name."""
    with pytest.raises(EngineError, match="'rows' is a shape, read on the host"):
        gpu.engine(gpu.plan(host_inputs=("rows",))).open()
    with pytest.raises(EngineError, match="'x' is FP8, which is not supported"):
        gpu.engine(gpu.plan(inputs={"x": ("float8", (-1, -1))})).open()


@pytest.mark.parametrize("fake", ["tensorrt"], indirect=True)
@pytest.mark.parametrize("allowed", [False, True])
def test_host_code_is_allowed_only_when_asked(gpu: Any, allowed: bool) -> None:
    """A plan may run code for the host only where the caller says so."""
    with gpu.engine(options=SessionOptions(allow_host_code=allowed)):
        assert gpu.module.runtime.engine_host_code_allowed is allowed


# --- results


def test_results(gpu: Any, engine: TensorRTEngine) -> None:
    """Outputs are arrays on the device with the right values, run after run and shape after shape."""
    for number, (rows, columns) in enumerate([(2, 8), (2, 8), (4, 16), (1, 64), (2, 8), (2, 8), (2, 8), (2, 8)]):
        feeds = gpu.feeds(rows, columns, seed=number)
        outputs = engine.run(feeds)
        assert all(isinstance(array, DeviceArray) for array in outputs.values())
        check(gpu, outputs, feeds)


def test_inputs_that_are_not_contiguous(gpu: Any, engine: TensorRTEngine) -> None:
    """Transposed and strided inputs are taken as they read."""
    feeds = gpu.feeds(4, 8)
    feeds["x"] = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32).T[::2]
    check(gpu, engine.run(feeds), feeds)


def test_outputs_outlive_later_runs_and_the_engine(gpu: Any) -> None:
    """An array keeps its values for as long as it is held, whatever runs later, and gives its memory back after."""
    with gpu.engine() as engine:
        feeds = [gpu.feeds(2, 8, seed=seed) for seed in range(6)]
        outputs = [engine.run(each) for each in feeds]
        for each, given in zip(outputs, feeds, strict=True):
            check(gpu, each, given)
    for each, given in zip(outputs, feeds, strict=True):
        check(gpu, each, given)
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
        check(gpu, engine.run({"x": x}), feeds | {"x": x})
    other = feeds | {"text": np.full((1, 3), 5, np.float32)}
    check(gpu, engine.run({"x": feeds["x"], "text": other["text"]}), other)
    check(gpu, engine.run({"x": feeds["x"]}), feeds)
    engine.bind({"text": other["text"]})
    check(gpu, engine.run({"x": feeds["x"]}), other)
    engine.bind({"rows": np.array([1, 1, 0])})
    check(gpu, engine.run({"x": feeds["x"]}), other | {"rows": np.array([1, 1, 0])})


def test_binding_a_device_array_does_not_write_to_it(gpu: Any, engine: TensorRTEngine) -> None:
    """An array of the caller's that is bound is used where it is; what is bound next does not overwrite it."""
    feeds = gpu.feeds(rows=2)
    x = engine.run(feeds)["y"]
    values = x.numpy()
    engine.bind({"x": x, "text": feeds["text"], "rows": feeds["rows"]})
    check(gpu, engine.run({}), feeds | {"x": values})
    engine.bind({"x": feeds["x"]})
    check(gpu, engine.run({}), feeds)
    np.testing.assert_array_equal(x.numpy(), values)


def test_binding_is_a_threads_own(gpu: Any, engine: TensorRTEngine) -> None:
    """Threads bind and run at the same time, each with its own values."""

    def work(seed: int) -> None:
        feeds = gpu.feeds(2, 8 if seed % 2 else 32, seed=seed)
        engine.bind({"text": feeds["text"], "rows": feeds["rows"]})
        for number in range(12):
            x = gpu.feeds(2, feeds["x"].shape[1], seed=100 * seed + number)["x"]
            check(gpu, engine.run({"x": x}), feeds | {"x": x})

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


# --- profiles and contexts


def test_profiles(gpu: Any) -> None:
    """The profile that holds the shapes is chosen, the nearer one where both do."""
    options = SessionOptions(contexts=1)
    with gpu.engine(options=options) as engine:
        for columns, profile in ((8, 0), (16, 0), (17, 1), (64, 1), (8, 0)):
            feeds = gpu.feeds(2, columns)
            check(gpu, engine.run(feeds), feeds)
            assert engine._opened_plan()._contexts[0]._profile == profile


@pytest.mark.parametrize(
    ("shape", "rows", "message"),
    [
        ((5, 8), 2, r"'x' has shape \(5, 8\), the plan was built for \(1, 8\) to \(4, 16\) or \(1, 16\) to \(4, 64\)"),
        ((2, 65), 2, r"'x' has shape \(2, 65\)"),
        ((2, 8), 9, r"'rows' has shape \(9,\)"),
    ],
)
def test_shapes_that_no_profile_holds(
    gpu: Any, engine: TensorRTEngine, shape: tuple[int, int], rows: int, message: str
) -> None:
    """Shapes outside of all profiles are refused with the ranges that there are; what ran before still runs."""
    feeds = gpu.feeds()
    check(gpu, engine.run(feeds), feeds)
    wrong = feeds | {"x": np.zeros(shape, np.float32), "rows": np.zeros(rows, np.int64)}
    with pytest.raises(TensorMismatchError, match=message):
        engine.run(wrong)
    check(gpu, engine.run(feeds), feeds)
    assert gpu.module.opened["context"] == 1


def test_inputs_that_fit_different_profiles(gpu: Any) -> None:
    """Inputs that each fit a profile, but none together, are refused as such."""
    plan = gpu.plan(profiles=[{"x": [(1, 8)] * 3, "rows": [(1,)] * 3}, {"x": [(1, 9)] * 3, "rows": [(2,)] * 3}])
    with gpu.engine(plan) as engine, pytest.raises(TensorMismatchError, match="no profile of the plan holds x"):
        engine.run(gpu.feeds(1, 8))


def test_contexts_are_few_and_kept_for_their_shapes(gpu: Any) -> None:
    """Each set of shapes has its context as long as there are enough; then the one unused for longest is taken."""
    with gpu.engine(options=SessionOptions(contexts=2)) as engine:
        for columns in (16, 8, 16, 8, 16, 8):
            engine.run(gpu.feeds(2, columns))
        assert gpu.module.opened["context"] == 2
        assert engine.graph_runs == (2, 4)
        engine.run(gpu.feeds(2, 24))
        engine.run(gpu.feeds(2, 16))
        assert gpu.module.opened["context"] == 2
        assert {dict(each.shapes)["x"] for each in engine._opened_plan()._contexts} == {(2, 24), (2, 16)}


def test_threads_wait_for_a_context(gpu: Any) -> None:
    """More threads than contexts take turns, and all get their own results."""
    gpu.module.slow = 0.001
    with gpu.engine(options=SessionOptions(contexts=2)) as engine, ThreadPoolExecutor(8) as threads:
        feeds = [
            gpu.feeds(1 + seed % 4, (8, 16, 32)[seed % 3], seed=seed) | {"rows": np.array([0])} for seed in range(40)
        ]
        for outputs, given in zip(threads.map(engine.run, feeds), feeds, strict=True):
            check(gpu, outputs, given)
        assert gpu.module.opened["context"] <= 2


# --- CUDA graphs


def test_a_graph_is_captured_the_second_time(gpu: Any, engine: TensorRTEngine) -> None:
    """The first run is plain, the second captures, later ones replay; other shapes have their own graph."""
    progress = []
    for seed in range(5):
        feeds = gpu.feeds(seed=seed)
        check(gpu, engine.run(feeds), feeds)
        progress.append(engine.graph_runs)
    assert progress == [(0, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    for seed in range(3):
        feeds = gpu.feeds(1, 8, seed=seed)
        check(gpu, engine.run(feeds), feeds)
    assert engine.graph_runs == (2, 6)
    check(gpu, engine.run(gpu.feeds()), gpu.feeds())
    assert engine.graph_runs == (2, 7)
    assert gpu.cuda.calls["cudaGraphLaunch"] == 7


def test_the_order_of_the_feeds_does_not_matter(gpu: Any, engine: TensorRTEngine) -> None:
    """Inputs in another order are the same inputs, and replay the same graph."""
    feeds = gpu.feeds()
    for names in (["x", "text", "rows"], ["rows", "x", "text"], ["text", "rows", "x"], ["x", "rows", "text"]):
        check(gpu, engine.run({name: feeds[name] for name in names}), feeds)
    assert engine.graph_runs == (1, 3)
    assert gpu.module.opened["context"] == 1


def test_a_graph_survives_binding_the_same_shapes(gpu: Any, engine: TensorRTEngine) -> None:
    """The next request's tensors take the places of the last one's, so its first step replays the graph already."""
    for seed in range(4):
        feeds = gpu.feeds(seed=seed)
        engine.bind({"text": feeds["text"], "rows": feeds["rows"]})
        for _ in range(2):
            check(gpu, engine.run({"x": feeds["x"]}), feeds)
    assert engine.graph_runs == (1, 7)


def test_a_graph_is_dropped_with_what_it_was_captured_with(gpu: Any) -> None:
    """Other shapes in the same context, and a larger arena, void its graphs; results stay right."""
    with gpu.engine(options=SessionOptions(contexts=1)) as engine:
        for columns in (8, 8, 8, 64, 8, 8, 8):
            feeds = gpu.feeds(2, columns, seed=columns)
            check(gpu, engine.run(feeds), feeds)
            assert gpu.cuda.leaks.get("executables", 0) <= 1
        assert engine.graph_runs == (2, 4)
    with gpu.engine() as engine:
        for rows in (1, 1, 4, 1, 1):  # the second context needs a larger arena
            feeds = gpu.feeds(rows, 8, seed=rows) | {"rows": np.array([0])}
            check(gpu, engine.run(feeds), feeds)
        assert engine.graph_runs == (2, 2)


def test_graphs_are_bounded(gpu: Any) -> None:
    """Threads that bind their own tensors do not pile up graphs."""
    with gpu.engine(options=SessionOptions(contexts=1)) as engine:

        def work(seed: int) -> None:
            feeds = gpu.feeds(seed=seed)
            engine.bind({"text": feeds["text"]})
            for _ in range(3):
                check(gpu, engine.run({"x": feeds["x"], "rows": feeds["rows"]}), feeds)
            kept.append(engine._local.own)

        kept: list[Any] = []
        for seed in range(12):
            thread = threading.Thread(target=work, args=(seed,))
            thread.start()
            thread.join()
        assert len(kept) == 12
        assert gpu.cuda.leaks["executables"] <= 4
        assert engine.graph_runs == (12, 24)


def test_graphs_can_be_switched_off(gpu: Any) -> None:
    """Without graphs nothing is captured, and results are the same."""
    with gpu.engine(options=SessionOptions(cuda_graphs=False)) as engine:
        for seed in range(4):
            feeds = gpu.feeds(seed=seed)
            check(gpu, engine.run(feeds), feeds)
        assert engine.graph_runs == (0, 0)
    assert gpu.cuda.calls["cudaStreamBeginCapture"] == 0


@pytest.mark.parametrize("failure", ["sdk", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails(gpu: Any, failure: str, caplog: pytest.LogCaptureFixture) -> None:
    """A plan that cannot be captured runs without graphs: one warning, the same results, no second attempt."""
    if failure == "sdk":
        gpu.module.capturable = False
    elif failure == "cudaStreamEndCapture":
        end = gpu.cuda.cudaStreamEndCapture

        def invalidated(stream: int) -> Any:
            _, graph = end(stream)
            del gpu.cuda.graphs[graph]
            return gpu.fakes.CudaError.cudaErrorStreamCaptureInvalidated, None

        gpu.cuda.cudaStreamEndCapture = invalidated
    else:
        gpu.cuda.failures[failure] = gpu.fakes.CudaError.cudaErrorStreamCaptureInvalidated
    with gpu.engine() as engine:
        for seed in range(4):
            feeds = gpu.feeds(seed=seed)
            check(gpu, engine.run(feeds), feeds)
        assert engine.graph_runs == (0, 0)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "unet.plan" in warnings[0]
    assert "runs without CUDA graphs, with the same results but slower" in warnings[0]


# --- failures


@pytest.mark.parametrize(
    "call",
    ["execute_async_v3", "set_input_shape", "set_tensor_address", "infer_shapes", "set_device_memory"],
)
def test_failures_of_the_sdk(gpu: Any, call: str) -> None:
    """Each SDK call that fails is one sentence; the next run works, and nothing is lost."""
    with gpu.engine() as engine:
        feeds = gpu.feeds()
        gpu.module.failures[call] = f"reason of\n {call}"
        with pytest.raises(EngineError) as caught:
            engine.run(feeds)
        message = str(caught.value)
        assert "\n" not in message
        assert "unet.plan" in message
        if call != "infer_shapes":
            assert f"reason of {call}" in message
        gpu.module.failures.clear()
        check(gpu, engine.run(feeds), feeds)
        assert len(engine._opened_plan()._contexts) == 1


def test_failure_to_choose_a_profile(gpu: Any, engine: TensorRTEngine) -> None:
    """A profile that the SDK does not take is an error."""
    gpu.module.failures["set_optimization_profile_async"] = "no such profile"
    with pytest.raises(EngineError, match=r"choose an optimisation profile of unet.plan.*: no such profile"):
        engine.run(gpu.feeds())


def test_failure_to_create_a_context(gpu: Any, engine: TensorRTEngine) -> None:
    """A context that cannot be created is an error, and tried again by the next run."""
    gpu.module.failures["create_execution_context"] = "too many"
    with pytest.raises(EngineError, match=r"create an execution context of unet.plan.*: too many"):
        engine.run(gpu.feeds())
    gpu.module.failures.clear()
    check(gpu, engine.run(gpu.feeds()), gpu.feeds())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("cudaSetDevice", "choose the device"),
        ("cudaMemGetInfo", "ask for free memory"),
        ("cudaMalloc", "allocate"),
        ("cudaHostAlloc", "pinned host memory"),
        ("cudaMemcpyAsync", "copy"),
        ("cudaStreamCreateWithFlags", "create a stream"),
        ("cudaStreamSynchronize", "run unet.plan|wait for the device"),
    ],
)
def test_failures_of_cuda(gpu: Any, engine: TensorRTEngine, call: str, words: str) -> None:
    """Each CUDA call that fails is one sentence with CUDA's own words; the next run works."""
    feeds = gpu.feeds()
    gpu.cuda.failures[call] = gpu.fakes.CudaError.cudaErrorInvalidValue
    with pytest.raises(EngineError, match=rf"CUDA failed to .*({words}).*: invalidvalue \(cudaErrorInvalidValue\)$"):
        engine.run(feeds)
    gpu.cuda.failures.clear()
    for work in gpu.cuda.streams.values():
        work.clear()
    check(gpu, engine.run(feeds), feeds)


def test_failure_of_a_replay(gpu: Any, engine: TensorRTEngine) -> None:
    """A graph that cannot be launched is an error, not another way to run."""
    for _ in range(3):
        engine.run(gpu.feeds())
    gpu.cuda.failures["cudaGraphLaunch"] = gpu.fakes.CudaError.cudaErrorInvalidValue
    with pytest.raises(EngineError, match="CUDA failed to launch a graph"):
        engine.run(gpu.feeds())
    gpu.cuda.failures.clear()
    check(gpu, engine.run(gpu.feeds()), gpu.feeds())


def test_a_kernel_that_faults(gpu: Any, engine: TensorRTEngine) -> None:
    """What fails on the device appears as the error of its run."""
    gpu.cuda.fault = gpu.fakes.CudaError.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match=r"illegaladdress \(cudaErrorIllegalAddress\)"):
        engine.run(gpu.feeds())


# --- memory


def test_needs_are_told(gpu: Any) -> None:
    """Weights, activations and I/O at the largest shapes are known once the plan is open."""
    plan = gpu.plan()
    with gpu.engine(plan, signature=SIGNATURE) as engine:
        needs = engine.memory
        assert needs.weights == plan.stat().st_size
        assert needs.activations == 1000 * 4 * 64
        assert needs.io == 4 * (2 * 4 * 64) + 4 * 3 + 8 * 8 + 2 * 8 * 64
        assert str(needs).startswith("weights 0.0 MiB, activations up to 0.2 MiB")


@pytest.mark.parametrize(
    ("total", "columns", "message"),
    [
        (1000, 8, r"the weights of unet.plan \(.*\) need 0.0 MiB of device memory, .* are free; close other"),
        (
            200_000,
            64,
            r"the activations of unet.plan \(.*\) need 0.2 MiB of device memory, 0.2 MiB of 0.2 MiB are free; ",
        ),
        (5000, 8, r"the activations of unet.plan .* use a smaller size or batch"),
        (1600, 8, r"inputs and outputs of unet.plan \(.*\) need"),
    ],
    ids=["weights", "activations", "small", "inputs"],
)
def test_what_does_not_fit_is_refused_before_it_is_allocated(gpu: Any, total: int, columns: int, message: str) -> None:
    """Too little memory is one sentence with what is needed and what is free, and CUDA is not asked for it."""
    gpu.cuda.total = total
    with pytest.raises(EngineMemoryError, match=message) as caught, gpu.engine() as engine:
        engine.run(gpu.feeds(4, columns))
    assert isinstance(caught.value, MemoryError)
    assert gpu.cuda.used <= total
    assert all(size <= total for _, size in gpu.cuda.device.values())


def test_smaller_shapes_run_after_a_refusal(gpu: Any) -> None:
    """A size that does not fit leaves an engine that draws smaller ones."""
    gpu.cuda.total = 100_000
    with gpu.engine() as engine:
        with pytest.raises(EngineMemoryError):
            engine.run(gpu.feeds(4, 64))
        check(gpu, engine.run(gpu.feeds()), gpu.feeds())


def test_weight_streaming(gpu: Any) -> None:
    """A budget is set before contexts are made, counts as the need for weights, and needs a plan built for it."""
    plan = gpu.plan(streamable=5000)
    with gpu.engine(plan, options=SessionOptions(weight_streaming_budget=700)) as engine:
        assert engine._opened_plan()._engine.weight_streaming_budget_v2 == 700
        assert engine.memory.weights == 700
        for _ in range(3):
            check(gpu, engine.run(gpu.feeds()), gpu.feeds())
        assert engine.graph_runs == (0, 0)
    with gpu.engine(plan, options=SessionOptions(weight_streaming_budget=10**9)) as engine:
        assert engine._opened_plan()._engine.weight_streaming_budget_v2 == 5000
    with pytest.raises(InvalidRequestError, match="was not built for weight streaming"):
        gpu.engine(gpu.plan("other"), options=SessionOptions(weight_streaming_budget=700)).open()


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
        check(gpu, engine.run(feeds), feeds)


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
                check(gpu, each.result(), feeds)
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


def test_failures_while_closing_are_logged(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Closing goes on to the end whatever fails, and says what did."""
    engine = gpu.engine().open()
    engine.run(gpu.feeds())
    gpu.cuda.failures["cudaFreeHost"] = gpu.fakes.CudaError.cudaErrorInvalidValue
    engine.close()
    assert gpu.cuda.leaks == {"pinned": 1}
    assert "CUDA failed to free pinned host memory: invalidvalue" in caplog.text
    gpu.cuda.pinned.clear()


# --- the driver


class FakeDriver:
    """The CUDA driver's functions, for devices given by name and compute capability."""

    def __init__(self, devices: list[tuple[bytes, int, int]], status: int = 0) -> None:
        self.devices = devices
        self.status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = self.devices[device.value][0]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.devices[device.value][{75: 1, 76: 2}[attribute]]
        return 0


def test_devices_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and compute capabilities are the driver's."""
    driver = FakeDriver([(b"NVIDIA H100", 9, 0), (b"NVIDIA RTX 5090", 12, 0)])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert cuda_devices() == (CudaDevice("NVIDIA H100", "sm_90"), CudaDevice("NVIDIA RTX 5090", "sm_120"))


def test_no_driver_and_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing driver, one that does not start, and one without devices all mean: none."""

    def missing(name: str) -> Any:
        raise OSError(name)

    for load in (missing, lambda name: FakeDriver([(b"x", 9, 0)], status=100), lambda name: FakeDriver([])):
        monkeypatch.setattr(ctypes, "CDLL", load)
        assert cuda_devices() == ()
