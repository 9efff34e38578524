"""The ``fused`` loop with an engine on a device: what stays there, is bound and comes back. The GPU is make-believe."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.device import DeviceArray
from latentrt.engines.errors import EngineError
from latentrt.runtime import Pipeline
from latentrt.runtime.denoising.fused import FINITE_CHECK_EVERY

OPTIONS: dict[str, Any] = {"sampler": "dpmpp-2m", "steps": 10, "seed": 3, "guidance": 4.0}


class Watched:
    """A pipeline on a make-believe GPU, its host counterpart, and what the step's engine was given."""

    def __init__(self, cuda: Any, module: Any, device: Pipeline, host: Pipeline) -> None:
        self.cuda, self.module, self.device, self.host = cuda, module, device, host
        self.step: Any = device.engines["unet_step"]
        self.expected: dict[str, Any] = {}
        self.fed: list[dict[str, Any]] = []
        self.bound: list[dict[str, Any]] = []
        self.fetched = 0
        run, bind, to_host = self.step.run, self.step.bind, cuda.cudaMemcpyAsync

        def watch_copy(target: int, source: int, nbytes: int, kind: int, stream: int) -> Any:
            self.fetched += kind == cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            return to_host(target, source, nbytes, kind, stream)

        cuda.cudaMemcpyAsync = watch_copy
        self.step.run = lambda feeds: (self.fed.append(dict(feeds)), run(feeds))[1]
        self.step.bind = lambda feeds: (self.bound.append(dict(feeds)), bind(feeds))[1]

    def host_latents(self, prompt: str, **options: Any) -> Any:
        """What the host's loop computes, once for all tests."""
        key = repr((prompt, options))
        if key not in self.expected:
            self.expected[key] = self.host(prompt, **options).latents
        return self.expected[key]

    def forget(self) -> None:
        self.fed.clear()
        self.bound.clear()
        self.fetched = 0


@pytest.fixture(scope="module")
def watched(
    fake_gpu: Any, tiny_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """The tiny model on a make-believe GPU, which computes with ONNX Runtime, and on the host."""
    bundle = tmp_path_factory.mktemp("device") / "sd1"
    shutil.copytree(tiny_bundles["sd1"], bundle)
    cuda = fake_gpu.FakeCuda()
    module = fake_gpu.make_sdk(cuda, "tensorrt-rtx")
    fake_gpu.add_plans(bundle, module, "tensorrt-rtx")
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        fake_gpu.installed(monkeypatch, module, cuda, "tensorrt-rtx"),
        Pipeline.load(bundle, "tensorrt-rtx", prompt_cache=0) as device,
        Pipeline.load(bundle, "onnxruntime", threads=1) as host,
    ):
        both = Watched(cuda, module, device, host)
        yield both
    both.forget()
    gc.collect()
    assert cuda.leaks == {}


@pytest.fixture
def both(watched: Watched) -> Watched:
    """The same, with nothing recorded."""
    watched.forget()
    return watched


def test_the_same_picture_as_on_the_host(both: Watched, varied: dict[str, Any]) -> None:
    """Latents and pixels are those of the host's loop, request after request."""
    for seed in (1, 2):
        asked = {**OPTIONS, **varied, "seed": seed}
        device, host = both.device("a red apple", **asked), both.host("a red apple", **asked)
        np.testing.assert_array_equal(device.latents, host.latents)
        np.testing.assert_array_equal(device.images, host.images)


def test_the_state_stays_on_the_device(both: Watched) -> None:
    """Registers go from step to step as they are; nothing is fetched but for a look at whether they are finite."""
    run = both.device.start("a red apple", **OPTIONS)
    both.forget()
    for step in range(OPTIONS["steps"]):
        both.device.advance([run])
        assert isinstance(run.registers, DeviceArray)
        assert isinstance(both.fed[-1]["registers"], DeviceArray) == bool(step)
    assert both.fetched == OPTIONS["steps"] // FINITE_CHECK_EVERY + 1


def test_what_does_not_change_is_bound_once(both: Watched) -> None:
    """Prompt tensors, rows and guidance are bound at the first step; steps are given only what changes."""
    run = both.device.start("a red apple", **OPTIONS)
    both.forget()
    while not run.done:
        both.device.advance([run])
    (bound,) = both.bound
    assert {"rows", "unconditional", "conditional", "guidance", "guidance_rescale", "noise"} <= bound.keys()
    assert bound.keys() | both.fed[0].keys() == both.step.inputs.keys()
    assert all(feeds.keys().isdisjoint(bound) for feeds in both.fed)
    noisy = both.device.start("a red apple", **{**OPTIONS, "sampler": "euler-a"})
    both.device.advance([noisy])
    assert "noise" not in both.bound[-1]
    assert "noise" in both.fed[-1]


def test_guidance_for_a_while_is_bound_anew(both: Watched) -> None:
    """Where guidance begins or ends, the halves' tensors are bound again, and nowhere else."""
    both.device("a red apple", **OPTIONS, guidance_start=0.3, guidance_end=0.7)
    assert [len(bound["rows"]) for bound in both.bound] == [1, 2, 1]


def test_runs_in_turn(both: Watched) -> None:
    """Runs that are taken further one by one in turn, and in several threads, keep their own prompts."""
    prompts = ["a red apple", "a rocket", "a cat"]
    expected = [both.host_latents(prompt, **OPTIONS) for prompt in prompts]
    runs = [both.device.start(prompt, **OPTIONS) for prompt in prompts]
    while not runs[0].done:
        for run in runs:
            both.device.advance([run])
    for run, latents in zip(runs, expected, strict=True):
        np.testing.assert_array_equal(run.latents, latents)

    found: dict[str, Any] = {}
    threads = [
        threading.Thread(target=lambda p=prompt: found.update({p: both.device(p, **OPTIONS).latents}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, latents in zip(prompts, expected, strict=True):
        np.testing.assert_array_equal(found[prompt], latents)


def test_mixed_batches(both: Watched) -> None:
    """Runs that share calls for a while go through the host and back, and end as they would alone."""
    options = [OPTIONS, {**OPTIONS, "sampler": "euler-a", "seed": 5, "images": 2}, {**OPTIONS, "guidance": 1.0}]
    expected = [both.host_latents("a red apple", **each) for each in options]
    runs = [both.device.start("a red apple", **each) for each in options]
    both.device.advance(runs[:1])
    for _ in range(3):
        both.device.advance(runs)
    for run, latents in zip(runs, expected, strict=True):
        while not run.done:
            both.device.advance([run])
        np.testing.assert_allclose(run.latents, latents, atol=1e-4)


def test_two_pipelines_share_a_step(both: Watched) -> None:
    """A loop does not rely on what it bound if another loop bound the same engine since."""
    other = Pipeline(both.device.bundle, both.device.engines)
    one, two = both.device.start("a red apple", **OPTIONS), other.start("a rocket", **OPTIONS)
    while not one.done:
        both.device.advance([one])
        other.advance([two])
    np.testing.assert_array_equal(one.latents, both.host_latents("a red apple", **OPTIONS))
    np.testing.assert_array_equal(two.latents, both.host_latents("a rocket", **OPTIONS))


def test_previews_are_fetched_when_looked_at(both: Watched) -> None:
    """A stream fetches latents only for steps that somebody looks at, and each shows its own step."""
    expected = [step.latents for step in both.host.stream("a red apple", **OPTIONS)]
    both.device("a red apple", **OPTIONS)
    both.forget()
    list(both.device.stream("a red apple", **OPTIONS))
    unseen = both.fetched
    both.forget()
    steps = list(both.device.stream("a red apple", **OPTIONS))
    assert both.fetched == unseen
    np.testing.assert_array_equal(steps[2].latents, expected[2])
    assert steps[2].latents is steps[2].latents
    assert both.fetched == unseen + 1
    for step, latents in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(step.latents, latents)


@pytest.mark.parametrize(("broken", "value"), [(0, np.nan), (3, np.inf), (FINITE_CHECK_EVERY, np.nan), (9, np.inf)])
def test_values_that_are_not_finite(both: Watched, broken: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN or infinity at any step is an error that names the step's component, at the next look; no picture comes."""
    run = both.device.start("a red apple", **OPTIONS)
    plan = next(plan for content, plan in both.module.plans.items() if content.startswith(b"plan of unet_step"))
    compute, calls = plan.compute, []

    def finish() -> None:
        while not run.done:
            both.device.advance([run])

    def spoil(feeds: Any, weights: Any) -> Any:
        calls.append(None)
        results = {name: each.copy() for name, each in compute(feeds, weights).items()}
        if len(calls) == broken + 1:
            results["updated_registers"][0, 0, 1, 2, 3] = value
        return results

    monkeypatch.setattr(plan, "compute", spoil)
    with pytest.raises(EngineError, match="unet_step computed values that are not finite"):
        finish()
    assert len(calls) == (FINITE_CHECK_EVERY if broken < FINITE_CHECK_EVERY else OPTIONS["steps"])
    assert run.index == len(calls) - 1, "the run has not moved"


def test_a_step_that_failed_may_be_taken_again(both: Watched) -> None:
    """After a failure of the engine the run is where it was."""
    run = both.device.start("a red apple", **OPTIONS)
    for _ in range(4):
        both.device.advance([run])
    for name in ("cudaGraphLaunch", "cudaMemcpyAsync"):
        both.cuda.failures[name] = both.cuda.cudaError_t.cudaErrorInvalidValue
        with pytest.raises(EngineError):
            both.device.advance([run])
        both.cuda.failures.clear()
        for stream in both.cuda.streams.values():
            stream.clear()
    assert run.index == 4
    while not run.done:
        both.device.advance([run])
    np.testing.assert_array_equal(run.latents, both.host_latents("a red apple", **OPTIONS))


def test_graphs_are_replayed_across_requests(both: Watched) -> None:
    """The second request of the same size captures nothing: its tensors lie where those of the first did."""
    width = {"width": 64}  # no other test's
    before = both.step.graph_runs
    both.device("a red apple", **OPTIONS, **width)
    first = both.step.graph_runs
    assert (first[0] - before[0], first[1] - before[1]) == (1, OPTIONS["steps"] - 1)
    both.device("a rocket", **OPTIONS, **width)
    assert both.step.graph_runs == (first[0], first[1] + OPTIONS["steps"])


def test_one_arena_for_all_components(both: Watched) -> None:
    """The components of a pipeline share the memory of their activations."""
    both.device("a red apple", **OPTIONS)
    engines: list[Any] = list(both.device.engines.values())
    assert len({id(engine.arena) for engine in engines}) == 1
    assert engines[0].arena.nbytes == 4096


def test_a_dropped_run_is_gone_at_once(both: Watched) -> None:
    """Nothing holds a run that was dropped, and its memory is free for the next."""
    run = both.device.start("a red apple", **OPTIONS)
    for _ in range(3):
        both.device.advance([run])
    watched = [weakref.ref(run), weakref.ref(run.registers)]
    del run
    both.forget()
    assert [each() for each in watched] == [None, None]
