"""Execution contexts on a make-believe GPU: profiles, CUDA graphs, and failures of a run. No SDK is needed."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import (
    EngineError,
    TensorMismatchError,
)
from latentrt.engines.trt import SessionOptions, TensorRTEngine


def test_profiles(gpu: Any) -> None:
    """The profile that holds the shapes is chosen, the nearer one where both do."""
    options = SessionOptions(contexts=1)
    with gpu.engine(options=options) as engine:
        for columns, profile in ((8, 0), (16, 0), (17, 1), (64, 1), (8, 0)):
            feeds = gpu.feeds(2, columns)
            gpu.check(engine.run(feeds), feeds)
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
    gpu.check(engine.run(feeds), feeds)
    wrong = feeds | {"x": np.zeros(shape, np.float32), "rows": np.zeros(rows, np.int64)}
    with pytest.raises(TensorMismatchError, match=message):
        engine.run(wrong)
    gpu.check(engine.run(feeds), feeds)
    assert gpu.module.opened["context"] == 1


def test_inputs_that_fit_different_profiles(gpu: Any) -> None:
    """Inputs that each fit a profile, but none together, are refused as such."""
    plan = gpu.plan(profiles=[{"x": [(1, 8)] * 3, "rows": [(1,)] * 3}, {"x": [(1, 9)] * 3, "rows": [(2,)] * 3}])
    with gpu.engine(plan) as engine, pytest.raises(TensorMismatchError, match="no profile of the plan holds x"):
        engine.run(gpu.feeds(1, 8))


# --- CUDA graphs


def test_a_graph_is_captured_the_second_time(gpu: Any, engine: TensorRTEngine) -> None:
    """The first run is plain, the second captures, later ones replay; other shapes have their own graph."""
    progress = []
    for seed in range(5):
        feeds = gpu.feeds(seed=seed)
        gpu.check(engine.run(feeds), feeds)
        progress.append(engine.graph_runs)
    assert progress == [(0, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    for seed in range(3):
        feeds = gpu.feeds(1, 8, seed=seed)
        gpu.check(engine.run(feeds), feeds)
    assert engine.graph_runs == (2, 6)
    gpu.check(engine.run(gpu.feeds()), gpu.feeds())
    assert engine.graph_runs == (2, 7)
    assert gpu.cuda.calls["cudaGraphLaunch"] == 7


def test_the_order_of_the_feeds_does_not_matter(gpu: Any, engine: TensorRTEngine) -> None:
    """Inputs in another order are the same inputs, and replay the same graph."""
    feeds = gpu.feeds()
    for names in (["x", "text", "rows"], ["rows", "x", "text"], ["text", "rows", "x"], ["x", "rows", "text"]):
        gpu.check(engine.run({name: feeds[name] for name in names}), feeds)
    assert engine.graph_runs == (1, 3)
    assert gpu.module.opened["context"] == 1


def test_a_graph_survives_binding_the_same_shapes(gpu: Any, engine: TensorRTEngine) -> None:
    """The next request's tensors take the places of the last one's, so its first step replays the graph already."""
    for seed in range(4):
        feeds = gpu.feeds(seed=seed)
        engine.bind({"text": feeds["text"], "rows": feeds["rows"]})
        for _ in range(2):
            gpu.check(engine.run({"x": feeds["x"]}), feeds)
    assert engine.graph_runs == (1, 7)


def test_a_graph_is_dropped_with_what_it_was_captured_with(gpu: Any) -> None:
    """Other shapes in the same context, and a larger arena, void its graphs; results stay right."""
    with gpu.engine(options=SessionOptions(contexts=1)) as engine:
        for columns in (8, 8, 8, 64, 8, 8, 8):
            feeds = gpu.feeds(2, columns, seed=columns)
            gpu.check(engine.run(feeds), feeds)
            assert gpu.cuda.leaks.get("executables", 0) <= 1
        assert engine.graph_runs == (2, 4)
    with gpu.engine() as engine:
        for rows in (1, 1, 4, 1, 1):  # the second context needs a larger arena
            feeds = gpu.feeds(rows, 8, seed=rows) | {"rows": np.array([0])}
            gpu.check(engine.run(feeds), feeds)
        assert engine.graph_runs == (2, 2)


def test_graphs_are_bounded(gpu: Any) -> None:
    """Threads that bind their own tensors do not pile up graphs."""
    with gpu.engine(options=SessionOptions(contexts=1)) as engine:

        def work(seed: int) -> None:
            feeds = gpu.feeds(seed=seed)
            engine.bind({"text": feeds["text"]})
            for _ in range(3):
                gpu.check(engine.run({"x": feeds["x"], "rows": feeds["rows"]}), feeds)
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
            gpu.check(engine.run(feeds), feeds)
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
            gpu.check(engine.run(feeds), feeds)
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
        gpu.check(engine.run(feeds), feeds)
        assert len(engine._opened_plan()._contexts) == 1


def test_failure_to_choose_a_profile(gpu: Any, engine: TensorRTEngine) -> None:
    """A profile that the SDK does not take is an error."""
    gpu.module.failures["set_optimization_profile_async"] = "no such profile"
    with pytest.raises(EngineError, match=r"choose an optimisation profile of unet.plan.*: no such profile"):
        engine.run(gpu.feeds())


def test_failure_of_a_replay(gpu: Any, engine: TensorRTEngine) -> None:
    """A graph that cannot be launched is an error, not another way to run."""
    for _ in range(3):
        engine.run(gpu.feeds())
    gpu.cuda.failures["cudaGraphLaunch"] = gpu.fakes.CudaError.cudaErrorInvalidValue
    with pytest.raises(EngineError, match="CUDA failed to launch a graph"):
        engine.run(gpu.feeds())
    gpu.cuda.failures.clear()
    gpu.check(engine.run(gpu.feeds()), gpu.feeds())


def test_a_kernel_that_faults(gpu: Any, engine: TensorRTEngine) -> None:
    """What fails on the device appears as the error of its run."""
    gpu.cuda.fault = gpu.fakes.CudaError.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match=r"illegaladdress \(cudaErrorIllegalAddress\)"):
        engine.run(gpu.feeds())
