"""What a result and the steps before it hold: shapes, types, times, and latents that belong to the caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from latentrt.engines import Array
from latentrt.runtime import Bundle, Pipeline


def test_a_steps_latents_are_the_callers(pipe: Pipeline) -> None:
    """Whatever a caller does to the latents of a step, the picture stays the same."""
    expected = pipe("a red apple", steps=3, seed=1).images
    stream = pipe.stream("a red apple", steps=3, seed=1)
    try:
        while True:
            next(stream).latents[:] = np.nan
    except StopIteration as stop:
        np.testing.assert_array_equal(stop.value.images, expected)


def test_a_result_says_all(pipe: Pipeline) -> None:
    """Images, latents, request and timings have the documented shapes and types."""
    result = pipe("a red apple", steps=3, images=2, width=48, height=24, seed=5, sampler="euler", guidance=2)
    assert (result.images.dtype, result.images.shape) == (np.uint8, (2, 24, 48, 3))
    assert (result.latents.dtype, result.latents.shape) == (np.float32, (2, 4, 12, 24))
    assert result.images.flags.c_contiguous
    request = result.request
    assert (request.prompt, request.negative_prompt, request.seed, request.steps) == ("a red apple", "", 5, 3)
    assert (request.width, request.height, request.images, request.guidance) == (48, 24, 2, 2.0)
    assert result.truncated == 0
    timings = result.timings
    assert len(timings.step) == 3
    parts = [timings.text_encoder, timings.prompt, timings.schedule, *timings.step, timings.vae_decoder]
    assert min(parts) >= 0
    assert timings.total == pytest.approx(sum(parts), abs=1e-9)


def test_timings_are_of_the_work_alone(plain_model: Any, bundle: Bundle) -> None:
    """Each stage's time is spent in its engine; what the caller does between steps is not counted."""

    def slow(function: Any) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
        def wait(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
            time.sleep(0.02)
            return function(feeds)

        return wait

    stream = Pipeline(
        bundle, plain_model.fakes(slow(plain_model.encode), slow(plain_model.denoise), slow(plain_model.decode))
    ).stream("a red apple", steps=2)
    for _ in range(2):
        next(stream)
        time.sleep(0.3)
    timings = plain_model.finish(stream)[1].timings
    assert min(timings.text_encoder, timings.vae_decoder, *timings.step) >= 0.02
    assert 0.08 <= timings.total < 0.5
