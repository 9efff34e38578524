"""The runner: streams of steps, requests that are refused or cancelled, and engines that fail underneath it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from latentrt.engines import Array, FakeEngine
from latentrt.engines.errors import (
    EngineClosedError,
    EngineError,
    InvalidRequestError,
)
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.samplers import compile_plan

Function = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m", "heun"])
def test_a_stream_yields_after_every_model_call(
    plain_model: Any, pipe: Pipeline, engines: dict[str, FakeEngine], sampler: str, bundle: Bundle
) -> None:
    """Index, total and timestep are the plan's; the last latents are the result's."""
    steps, result = plain_model.finish(pipe.stream("a red apple", steps=4, seed=1, sampler=sampler))
    plan = compile_plan(sampler, bundle.manifest.scheduler, 4)
    assert [step.index for step in steps] == list(range(len(plan)))
    assert {step.total for step in steps} == {len(plan)} == {len(engines["unet"].calls)}
    assert [step.timestep for step in steps] == plan.timesteps.tolist()
    assert [call["timestep"][0] for call in engines["unet"].calls] == plan.timesteps.astype(np.float32).tolist()
    assert all(step.latents.dtype == np.float32 and step.latents.shape == (1, 4, 16, 16) for step in steps)
    np.testing.assert_array_equal(steps[-1].latents, result.latents)
    assert [step.elapsed for step in steps] == result.timings.step


def test_nothing_runs_before_the_first_next(pipe: Pipeline, engines: dict[str, FakeEngine]) -> None:
    """Making a stream checks the request and calls no engine."""
    pipe.stream("a red apple")
    assert all(engine.calls == [] for engine in engines.values())


def test_closing_a_stream_cancels_the_request(pipe: Pipeline, engines: dict[str, FakeEngine]) -> None:
    """After close no engine is called again, and the pipeline goes on serving."""
    stream = pipe.stream("a red apple", steps=10)
    next(stream)
    next(stream)
    stream.close()
    assert len(engines["unet"].calls) == 2
    assert engines["vae_decoder"].calls == []
    with pytest.raises(StopIteration):
        next(stream)
    assert pipe("a red apple", steps=2).images.shape == (1, 32, 32, 3)


def test_two_streams_interleave(plain_model: Any, pipe: Pipeline) -> None:
    """Streams that take turns give what each gives alone."""
    options: list[dict[str, Any]] = [
        {"prompt": "a red apple", "seed": 1, "sampler": "euler-a", "steps": 4},
        {"prompt": "a rocket", "seed": 2, "sampler": "dpmpp-2m", "steps": 4, "images": 2, "width": 48},
    ]
    alone = [pipe(**each) for each in options]
    streams = [pipe.stream(**each) for each in options]
    for _ in range(4):
        for stream in streams:
            next(stream)
    for stream, expected in zip(streams, alone, strict=True):
        _, result = plain_model.finish(stream)
        np.testing.assert_array_equal(result.images, expected.images)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a", {"steps": 0}, "steps is 0"),
        ("a", {"width": 33}, "width is 33, expected a multiple of 2; the nearest are 32 and 34"),
        ("a", {"sampler": "magic"}, "unknown sampler 'magic'"),
        ("a", {"sampler": "flow-euler"}, "sampler 'flow-euler' cannot run from the config of 'PNDMScheduler'"),
        ("a", {"cfg": 3, "step": 4}, "unknown option 'cfg'; known options: negative_prompt, steps, guidance"),
        ("a\ud800", {}, "prompt has a lone surrogate at position 1"),
        ("a", {"negative_prompt": "\udfff"}, "prompt has a lone surrogate at position 0"),
        ("a" * 2_000_000, {}, "expected at most 1000000; shorten it"),
        (3, {}, "prompt is a int, expected a string"),
    ],
)
def test_a_wrong_request_is_refused_at_once(
    pipe: Pipeline, engines: dict[str, FakeEngine], prompt: Any, options: dict[str, Any], message: str
) -> None:
    """stream itself raises, before its first step and before any engine is called."""
    with pytest.raises(InvalidRequestError, match=message):
        pipe.stream(prompt, **options)
    assert all(engine.calls == [] for engine in engines.values())


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_an_engine_that_fails_leaves_the_pipeline_usable(plain_model: Any, bundle: Bundle, component: str) -> None:
    """Its error reaches the caller as it is; the next request draws what it always draws."""
    expected = Pipeline(bundle, plain_model.fakes())("a red apple", steps=3, seed=1).images
    failure = EngineError(f"{component} failed: out of memory")
    fault = [failure]
    functions: dict[str, Function] = plain_model.FUNCTIONS
    working = functions[component]

    def fail_once(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if fault:
            raise fault.pop()
        return working(feeds)

    pipe = Pipeline(bundle, plain_model.fakes(*(functions | {component: fail_once}).values()))
    with pytest.raises(EngineError) as caught:
        pipe("a red apple", steps=3, seed=1)
    assert caught.value is failure
    np.testing.assert_array_equal(pipe("a red apple", steps=3, seed=1).images, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_values_that_are_not_finite_are_an_error(
    plain_model: Any, bundle: Bundle, component: str, value: float
) -> None:
    """One NaN or infinity names the engine that computed it, instead of ending in a black picture."""
    functions: dict[str, Function] = plain_model.FUNCTIONS
    sound = functions[component]

    def poison(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = dict(sound(feeds))
        for array in outputs.values():
            array[-1, -1, -1] = value
        return outputs

    engines = plain_model.fakes(*(functions | {component: poison}).values())
    with pytest.raises(EngineError, match=f"^{component} computed values that are not finite .*precision fp32"):
        Pipeline(bundle, engines)("a red apple", steps=3, sampler="euler")
    assert len(engines["unet"].calls) == {"text_encoder": 0, "unet": 1, "vae_decoder": 3}[component]


def test_a_closed_pipeline_says_so(plain_model: Any, bundle: Bundle) -> None:
    """Closing closes every engine, twice does nothing, and a request is told the way out."""
    engines = plain_model.fakes()
    with Pipeline(bundle, engines) as pipe:
        stream = pipe.stream("a red apple", steps=3)
        next(stream)
    pipe.close()
    for engine in engines.values():
        with pytest.raises(EngineClosedError):
            engine.run({})
    with pytest.raises(EngineClosedError, match=r"the pipeline is closed; load the bundle again with Pipeline\.load"):
        pipe("a red apple")
    with pytest.raises(EngineClosedError):
        next(stream)
