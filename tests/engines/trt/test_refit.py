"""Other weights for an open plan, on a make-believe GPU: always from the plan's own, and never under a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import (
    EngineClosedError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    TensorMismatchError,
)
from latentrt.engines.trt import TensorRTEngine


def weights(**values: float) -> dict[str, Any]:
    return {name: np.float32([value]) for name, value in values.items()}


@pytest.fixture
def engine(gpu: Any) -> Iterator[TensorRTEngine]:
    """An open engine of a plan that can be refitted."""
    with gpu.engine(gpu.plan(refittable=True)) as opened:
        yield opened


def computes(gpu: Any, engine: TensorRTEngine, scale: float, shift: float) -> None:
    for seed in range(3):
        feeds = gpu.feeds(seed=seed)
        np.testing.assert_allclose(
            engine.run(feeds)["y"].numpy(), gpu.expected(feeds, scale=scale, shift=shift), rtol=1e-6
        )


def test_each_refit_starts_from_the_plans_own_weights(gpu: Any, engine: TensorRTEngine) -> None:
    """A then B is B, what B leaves alone is the plan's own, and nothing at all is the plan as it was built."""
    computes(gpu, engine, 2, 1)
    engine.refit(weights(scale=5, shift=7))
    computes(gpu, engine, 5, 7)
    engine.refit(weights(shift=3))
    computes(gpu, engine, 2, 3)
    engine.refit(weights(scale=4))
    computes(gpu, engine, 4, 1)
    engine.refit({})
    computes(gpu, engine, 2, 1)
    engine.refit({})
    computes(gpu, engine, 2, 1)


def test_the_plan_is_read_again_only_where_weights_have_to_go(gpu: Any, engine: TensorRTEngine) -> None:
    """Weights that are all replaced are put in place as they are."""
    for value in (3, 4, 5):
        engine.refit(weights(scale=value))
    engine.refit(weights(scale=6, shift=1))
    assert gpu.module.opened["plan"] == 1
    engine.refit(weights(scale=6))
    assert gpu.module.opened["plan"] == 2
    computes(gpu, engine, 6, 1)


def test_an_engine_is_opened_with_other_weights(gpu: Any) -> None:
    """It computes with them from the first run; a plan that takes none does not open."""
    with gpu.engine(gpu.plan(refittable=True), weights=weights(scale=5)) as engine:
        computes(gpu, engine, 5, 1)
    with pytest.raises(InvalidRequestError, match="was not built to be refitted"):
        gpu.engine(gpu.plan("other"), weights=weights(scale=5)).open()


def test_weights_are_listed(gpu: Any, engine: TensorRTEngine) -> None:
    """Names, element types and sizes are those of the plan; a plan that takes none has none."""
    assert engine.weights == {"scale": ("float32", 1), "shift": ("float32", 1)}
    with gpu.engine(gpu.plan("other")) as other:
        assert other.weights == {}


def test_bound_inputs_survive(gpu: Any, engine: TensorRTEngine) -> None:
    """What a thread has bound stays bound when the plan is read again."""
    feeds = gpu.feeds()
    engine.bind({"text": feeds["text"], "rows": feeds["rows"]})
    engine.refit(weights(scale=5))
    engine.refit({})
    np.testing.assert_allclose(engine.run({"x": feeds["x"]})["y"].numpy(), gpu.expected(feeds), rtol=1e-6)


def test_graphs_are_captured_anew(gpu: Any, engine: TensorRTEngine) -> None:
    """A graph that was captured with other weights is not replayed."""
    computes(gpu, engine, 2, 1)
    captured, _ = engine.graph_runs
    engine.refit(weights(scale=5))
    assert gpu.cuda.leaks.get("executables", 0) == 0
    computes(gpu, engine, 5, 1)
    assert engine.graph_runs[0] == captured + 1


def test_refitting_while_others_run(gpu: Any, engine: TensorRTEngine) -> None:
    """A run sees all weights of one refit and none of another, whatever goes on at the same time."""
    gpu.module.slow = 0.0005
    pairs = [(2.0, 1.0), (5.0, 50.0), (9.0, 90.0)]
    stop = threading.Event()

    def run(seed: int) -> int:
        feeds, count = gpu.feeds(seed=seed), 0
        allowed = [gpu.expected(feeds, *pair) for pair in pairs]
        while True:  # at least once, however late the thread starts
            y = engine.run(feeds)["y"].numpy()
            assert any(np.allclose(y, each, rtol=1e-5) for each in allowed)
            count += 1
            if stop.is_set():
                return count

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(run, seed) for seed in range(4)]
        for number in range(30):
            scale, shift = pairs[number % 3]
            engine.refit(weights(scale=scale, shift=shift) if number % 3 else {})
        stop.set()
        assert sum(each.result() for each in running) >= 4


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (weights(scale=1, bias=2, gain=3), InvalidRequestError, r"has no weights 'bias' to refit \(and 1 more"),
        ({"scale": np.float16([1])}, TensorMismatchError, "'scale' are float16, 1 values; expected float32, 1 values"),
        ({"scale": np.zeros(2, np.float32)}, TensorMismatchError, "'scale' are float32, 2 values; expected float32, 1"),
    ],
    ids=["name", "type", "size"],
)
def test_weights_that_do_not_fit(
    gpu: Any, engine: TensorRTEngine, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    """They are refused before anything has changed, what was refitted before included."""
    engine.refit(weights(shift=9))
    with pytest.raises(error, match=message):
        engine.refit({"shift": np.float32([3]), **given})
    computes(gpu, engine, 2, 9)


def test_a_plan_that_cannot_be_refitted(gpu: Any) -> None:
    """It is refused, no weights included, with what to build."""
    with gpu.engine() as engine:
        for given in ({}, weights(scale=1)):
            with pytest.raises(InvalidRequestError, match=r"build it with BuildOptions\(refittable=True\)"):
                engine.refit(given)


def test_weights_that_the_plan_merged(gpu: Any) -> None:
    """Where the SDK needs further weights, they are named, and the plan has its own."""
    with gpu.engine(gpu.plan(refittable=True, merged=("scale", "shift"))) as engine:
        with pytest.raises(EngineError, match="give also shift; the plan has its own weights again"):
            engine.refit(weights(scale=5))
        computes(gpu, engine, 2, 1)
        engine.refit(weights(scale=5, shift=6))
        computes(gpu, engine, 5, 6)


@pytest.mark.parametrize("call", ["set_named_weights", "refit_cuda_engine"])
def test_a_refit_that_fails_halfway(gpu: Any, engine: TensorRTEngine, call: str) -> None:
    """The plan has its own weights again, not some of each, and the error says so."""
    engine.refit(weights(scale=5, shift=6))
    gpu.module.failures[call] = "out of luck"
    with pytest.raises(EngineError, match=r"out of luck; the plan has its own weights again"):
        engine.refit(weights(scale=7, shift=8))
    gpu.module.failures.clear()
    computes(gpu, engine, 2, 1)


def test_a_plan_that_cannot_be_read_again(gpu: Any, engine: TensorRTEngine) -> None:
    """If its own weights cannot be had, runs are refused until they can: nothing runs with weights unknown."""
    engine.refit(weights(scale=5))
    gpu.module.failures["deserialize_cuda_engine"] = "no memory"
    with pytest.raises(EngineUnavailableError, match="no memory"):
        engine.refit({})
    gpu.module.failures.clear()
    with pytest.raises(EngineClosedError, match="could not be read again after a refit; close it and open it anew"):
        engine.run(gpu.feeds())
    engine.refit({})
    computes(gpu, engine, 2, 1)
