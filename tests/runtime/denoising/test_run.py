"""A run: its noise and conditioning, the part that inpainting keeps, and that nothing holds a run that was dropped."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import numpy as np
import pytest
import torch

from latentrt.runtime import Pipeline
from latentrt.runtime.denoising.latent_preparation import start_run
from latentrt.runtime.denoising.run import InpaintBlend, Run
from latentrt.runtime.request.request import Request
from latentrt.runtime.samplers import compile_plan


def test_a_dropped_run_is_gone_at_once(looped: Pipeline) -> None:
    """Nothing holds a run that was dropped after any step, nor a stream that nobody reads any more."""
    for steps in range(3):
        run: Run = looped.start("a red apple", steps=4, sampler="euler-a")
        for _ in range(steps):
            looped.advance([run])
        watched = [weakref.ref(run), weakref.ref(run.generator)]
        del run
        assert [each() for each in watched] == [None, None]
    stream = looped.stream("a red apple", steps=4, sampler="euler-a")
    next(stream)
    run = stream.gi_yieldfrom.gi_frame.f_locals["runs"][0]
    watched = [weakref.ref(run)]
    del run
    stream.close()
    assert watched[0]() is None


@pytest.mark.heavy
def test_a_thousand_runs_leave_nothing(looped: Pipeline) -> None:
    """Runs that end, that are cancelled and that are left half read take no memory with them."""

    def some(count: int) -> None:
        for number in range(count):
            stream = looped.stream(f"apple {number % 7}", steps=2, sampler="euler-a", seed=number)
            for _ in range(number % 4):  # up to one more than there are steps
                next(stream, None)
            if number % 2:
                stream.close()
            del stream

    some(30)  # what is imported, cached or allocated at first
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        some(1000)
        gc.collect()
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    grown = sum(entry.size_diff for entry in after.compare_to(before, "filename"))
    assert grown < 200_000, "less than 200 bytes a run; one tensor of latents has 4 kB"


def begun(sampler: str = "euler-a", images: int = 3, **options: float) -> Run:
    """A run before its first step."""
    asked = Request("p", "n", 4, 5.0, 7, sampler, 48, 32, images, 0, **options)  # type: ignore[arg-type]
    plan = compile_plan(sampler, {"_class_name": "EulerDiscreteScheduler"}, 4)
    texts = [{"text": np.full((1, 2), value, np.float32)} for value in range(2)]
    return start_run(asked, plan, texts, (images, 4, 4, 6))


def test_noise_stays_until_the_step_was_taken() -> None:
    """Each step's noise is the next of torch's stream, and none is drawn where the plan uses none."""
    run, stream = begun(), torch.Generator().manual_seed(7)
    torch.randn((3, 4, 4, 6), generator=stream)  # the run's first latents
    for index in range(3):
        first, again = run.draw(), run.draw()
        assert first is again
        np.testing.assert_allclose(first, torch.randn((3, 4, 4, 6), generator=stream).numpy(), atol=1e-6)
        run.index = index + 1
    assert run.draw() is None
    assert begun("euler").draw() is None


def test_conditioning_of_some_images() -> None:
    """Rows of both halves while guidance is on, of the conditional one alone where it is off."""
    run = begun(guidance_start=0.25)
    assert (run.guided, run.done, len(run), run.latent_shape) == (False, False, 4, (3, 4, 4, 6))
    np.testing.assert_array_equal(run.conditioning_rows(0, 3)["text"][:, 0], [1, 1, 1])
    run.index = 1
    assert run.guided
    np.testing.assert_array_equal(run.conditioning_rows(0, 3)["text"][:, 0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(run.conditioning_rows(1, 3)["text"][:, 0], [0, 0, 1, 1])
    run.index = 4
    assert run.done


@pytest.mark.parametrize("index", [0, 2, 4])
def test_inpainting_keeps_the_image_outside_of_the_mask(index: int) -> None:
    """Outside it is the image at the level of noise that comes next, at last without noise; other registers stay."""
    run = begun("dpmpp-2m", images=2)
    random = np.random.default_rng(0)
    sample, noise = (random.standard_normal((count, 4, 4, 6)).astype(np.float32) for count in (1, 2))
    mask = np.zeros((1, 1, 4, 6), np.float32)
    mask[..., 3:] = 1
    before = random.standard_normal((2, run.plan.registers, 4, 4, 6)).astype(np.float32)
    given = before.copy()
    found = InpaintBlend(sample, noise, mask).restore(run.plan, index, given)
    np.testing.assert_array_equal(given, before)
    np.testing.assert_array_equal(found[:, 1:], before[:, 1:])
    np.testing.assert_array_equal(found[:, 0, :, :, 3:], before[:, 0, :, :, 3:])
    outside = sample.repeat(2, axis=0) if index == 4 else run.plan.noised(index, sample, noise)
    np.testing.assert_allclose(found[:, 0, :, :, :3], outside[..., :3], rtol=1e-6)
