"""Plans on a make-believe GPU: what is refused when one is opened, contexts, and memory. No SDK is needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from latentrt.engines import TensorSpec
from latentrt.engines.errors import (
    EngineError,
    EngineMemoryError,
    EngineUnavailableError,
    InvalidRequestError,
)
from latentrt.engines.trt import SessionOptions, TensorRTEngine

SIGNATURE = (
    [
        TensorSpec("x", "float32", ("batch", "columns")),
        TensorSpec("text", "float32", (1, 3)),
        TensorSpec("rows", "int64", ("rows",)),
    ],
    [TensorSpec("y", "float32", ("batch", "columns")), TensorSpec("picked", "float16", ("rows", "columns"))],
)


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


# --- contexts


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
            gpu.check(outputs, given)
        assert gpu.module.opened["context"] <= 2


def test_failure_to_create_a_context(gpu: Any, engine: TensorRTEngine) -> None:
    """A context that cannot be created is an error, and tried again by the next run."""
    gpu.module.failures["create_execution_context"] = "too many"
    with pytest.raises(EngineError, match=r"create an execution context of unet.plan.*: too many"):
        engine.run(gpu.feeds())
    gpu.module.failures.clear()
    gpu.check(engine.run(gpu.feeds()), gpu.feeds())


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
        gpu.check(engine.run(gpu.feeds()), gpu.feeds())


def test_weight_streaming(gpu: Any) -> None:
    """A budget is set before contexts are made, counts as the need for weights, and needs a plan built for it."""
    plan = gpu.plan(streamable=5000)
    with gpu.engine(plan, options=SessionOptions(weight_streaming_budget=700)) as engine:
        assert engine._opened_plan()._engine.weight_streaming_budget_v2 == 700
        assert engine.memory.weights == 700
        for _ in range(3):
            gpu.check(engine.run(gpu.feeds()), gpu.feeds())
        assert engine.graph_runs == (0, 0)
    with gpu.engine(plan, options=SessionOptions(weight_streaming_budget=10**9)) as engine:
        assert engine._opened_plan()._engine.weight_streaming_budget_v2 == 5000
    with pytest.raises(InvalidRequestError, match="was not built for weight streaming"):
        gpu.engine(gpu.plan("other"), options=SessionOptions(weight_streaming_budget=700)).open()
