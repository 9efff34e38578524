"""The ``fused`` loop with ONNX Runtime's engines for GPUs: real sessions and values, the CPU being the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import EngineError
from latentrt.engines.onnxrt_gpu import OrtArray
from latentrt.runtime import Pipeline
from latentrt.runtime.denoising.fused import FINITE_CHECK_EVERY

OPTIONS: dict[str, Any] = {"sampler": "dpmpp-2m", "steps": 10, "seed": 3, "guidance": 4.0}
PROMPT = "a red apple"


class Both:
    """A pipeline whose state stays with ONNX Runtime, others to hold it against, and what was fed and fetched."""

    def __init__(self, device: Pipeline, host: Pipeline, plain: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.host, self.plain = device, host, plain
        self.step: Any = device.engines["unet_step"]
        self.fed: list[dict[str, Any]] = []
        self.bound: list[dict[str, Any]] = []
        self.fetched: list[tuple[int, ...]] = []
        run, bind, numpy = self.step.run, self.step.bind, OrtArray.numpy
        monkeypatch.setattr(self.step, "run", lambda feeds: (self.fed.append(dict(feeds)), run(feeds))[1])
        monkeypatch.setattr(self.step, "bind", lambda feeds: (self.bound.append(dict(feeds)), bind(feeds))[1])
        monkeypatch.setattr(OrtArray, "numpy", lambda array: (self.fetched.append(array.shape), numpy(array))[1])

    def forget(self) -> None:
        self.fed.clear()
        self.bound.clear()
        self.fetched.clear()


@pytest.fixture(scope="module")
def opened(fake_gpu: Any, tiny_bundles: dict[str, Path]) -> Iterator[tuple[Pipeline, Pipeline, Pipeline]]:
    """The tiny model with its state on the device, with it on the host, and in the plain loop."""
    bundle = tiny_bundles["sd1"]
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        fake_gpu.onnxruntime_on_cpu(monkeypatch),
        Pipeline.load(bundle, "onnxruntime-cuda", prompt_cache=0) as device,
        Pipeline.load(bundle, "onnxruntime", threads=1) as host,
        Pipeline.load(bundle, "onnxruntime", threads=1, loop="plain") as plain,
    ):
        yield device, host, plain


@pytest.fixture
def both(opened: tuple[Pipeline, Pipeline, Pipeline], monkeypatch: pytest.MonkeyPatch) -> Both:
    """The same, with a record that is empty."""
    return Both(*opened, monkeypatch)


def test_the_same_picture_as_on_the_host(both: Both, varied: dict[str, Any]) -> None:
    """Latents and pixels are those of the host's loop to the bit, and those of the plain loop to rounding."""
    asked = {**OPTIONS, **varied}
    device, host, plain = (pipe(PROMPT, **asked) for pipe in (both.device, both.host, both.plain))
    np.testing.assert_array_equal(device.latents, host.latents)
    np.testing.assert_array_equal(device.images, host.images)
    np.testing.assert_allclose(device.latents, plain.latents, rtol=0, atol=1e-5 * np.abs(plain.latents).max())


def test_the_state_stays_on_the_device(both: Both) -> None:
    """What a step hands out is what the next one takes in; nothing is fetched but to see whether it is finite."""
    run = both.device.start(PROMPT, **OPTIONS)
    both.forget()
    last: Any = run.registers
    for step in range(OPTIONS["steps"]):
        both.device.advance([run])
        registers: Any = run.registers
        assert isinstance(registers, OrtArray)
        assert both.fed[-1]["registers"] is last
        if step:
            assert registers.value.data_ptr() != last.value.data_ptr()
        last = registers
    assert both.fetched == [last.shape] * (OPTIONS["steps"] // FINITE_CHECK_EVERY + 1)
    (bound,) = both.bound
    assert {"rows", "unconditional", "conditional", "guidance", "guidance_rescale", "noise"} <= bound.keys()
    assert all(feeds.keys().isdisjoint(bound) for feeds in both.fed)


def test_memory_goes_round(both: Both) -> None:
    """A run that nobody looks back on needs two places for its state, whatever the number of its steps."""
    run = both.device.start(PROMPT, **{**OPTIONS, "steps": 24})
    places = []
    while not run.done:
        both.device.advance([run])
        both.forget()
        registers: Any = run.registers
        places.append(registers.value.data_ptr())
    # Other tensors share the arena, so a place may change now and then.
    assert len(set(places)) < len(places) // 4


def test_previews_show_their_own_step(both: Both) -> None:
    """Every step that is held keeps its latents, and they are fetched when somebody looks."""
    expected = [step.latents for step in both.host.stream(PROMPT, **OPTIONS)]
    both.forget()
    steps = list(both.device.stream(PROMPT, **OPTIONS))
    unseen = len(both.fetched)
    assert steps[2].latents is steps[2].latents
    assert len(both.fetched) == unseen + 1
    for step, latents in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(step.latents, latents)


def test_mixed_batches(both: Both) -> None:
    """Runs that share calls for a while go through the host and back, and end as they would alone."""
    options = [OPTIONS, {**OPTIONS, "sampler": "euler-a", "seed": 5, "images": 2}, {**OPTIONS, "guidance": 1.0}]
    expected = [both.host(PROMPT, **each).latents for each in options]
    runs = [both.device.start(PROMPT, **each) for each in options]
    both.device.advance(runs[:1])
    before = runs[0].latents
    for _ in range(3):
        both.device.advance(runs)
    assert not np.array_equal(before, runs[0].latents)
    for run, latents in zip(runs, expected, strict=True):
        while not run.done:
            both.device.advance([run])
        assert isinstance(run.registers, OrtArray)
        np.testing.assert_allclose(run.latents, latents, atol=1e-4)


def test_threads_and_turns(both: Both) -> None:
    """Runs in turn on one thread and runs on several threads keep their own prompts and states."""
    prompts = ["a red apple", "a rocket", "a cat"]
    expected = [both.host(prompt, **OPTIONS).latents for prompt in prompts]
    runs = [both.device.start(prompt, **OPTIONS) for prompt in prompts]
    while not runs[0].done:
        for run in runs:
            both.device.advance([run])
    for run, latents in zip(runs, expected, strict=True):
        np.testing.assert_array_equal(run.latents, latents)
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda prompt: both.device(prompt, **OPTIONS).latents, prompts * 2)
        for latents, wanted in zip(found, expected * 2, strict=True):
            np.testing.assert_array_equal(latents, wanted)


def test_a_run_may_change_threads(both: Both) -> None:
    """Each step on another thread gives what one thread gives: the state is the run's, what is bound a thread's."""
    run = both.device.start(PROMPT, **OPTIONS)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for step in range(OPTIONS["steps"]):
            (one, two)[step % 2].submit(both.device.advance, [run]).result()
    np.testing.assert_array_equal(run.latents, both.host(PROMPT, **OPTIONS).latents)


@pytest.mark.parametrize(("broken", "value"), [(2, np.nan), (FINITE_CHECK_EVERY, np.inf)])
def test_values_that_are_not_finite(both: Both, broken: int, value: float) -> None:
    """NaN or infinity in the state is an error at the next look, which names the step; no picture comes."""
    run = both.device.start(PROMPT, **OPTIONS)

    def finish() -> None:
        while not run.done:
            if run.index == broken:
                np.asarray(run.registers.value.numpy())[0, 0, 1, 2, 3] = value  # type: ignore[union-attr]  # a view
            both.device.advance([run])

    with pytest.raises(EngineError, match="unet_step computed values that are not finite"):
        finish()
    assert run.index == (FINITE_CHECK_EVERY if broken < FINITE_CHECK_EVERY else OPTIONS["steps"]) - 1


def test_a_step_that_failed_may_be_taken_again(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's error is the cause of one sentence; the run is where it was, and goes on from there."""
    run = both.device.start(PROMPT, **OPTIONS)
    for _ in range(4):
        both.device.advance([run])

    def fail(*arguments: Any) -> None:
        raise RuntimeError("CUBLAS failure 13")

    before = run.registers
    with monkeypatch.context() as patched:
        patched.setattr(type(both.step._running_session()), "run_with_iobinding", fail)
        with pytest.raises(EngineError, match=r"^unet_step \(onnxruntime-cuda\) failed: CUBLAS failure 13") as caught:
            both.device.advance([run])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert (run.index, run.registers) == (4, before)
    while not run.done:
        both.device.advance([run])
    np.testing.assert_array_equal(run.latents, both.host(PROMPT, **OPTIONS).latents)


def test_a_dropped_run_is_gone_at_once(both: Both) -> None:
    """Nothing holds a run that was dropped, nor its state."""
    run = both.device.start(PROMPT, **OPTIONS)
    for _ in range(3):
        both.device.advance([run])
    watched = [weakref.ref(run), weakref.ref(run.registers)]
    del run
    both.forget()
    gc.collect()
    assert [each() for each in watched] == [None, None]
