"""Several prompts, several pictures, and calls of a limited size, beside diffusers and beside single requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentrt.engines import FakeEngine
from latentrt.engines.errors import EngineError, InvalidRequestError
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.samplers.noise import SharedNoise, TorchGenerator

GATE = 45.0
"""Least PSNR in dB, on uint8 pictures."""
PROMPTS, NEGATIVES = ["a red apple", "a rocket"], ["a green leaf", "a cat"]
SAMPLERS = {"euler": "EulerDiscreteScheduler", "euler-a": "EulerAncestralDiscreteScheduler"}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(kind: str, tiny: Any) -> Iterator[Pipeline]:
    with Pipeline.load(tiny.bundle(kind), "onnxruntime") as opened:
        yield opened


@pytest.fixture(scope="module")
def theirs(kind: str, tiny: Any) -> Any:
    """diffusers' pipeline in fp32."""
    name = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
    opened = getattr(diffusers, name).from_pretrained(tiny.source(kind), torch_dtype=torch.float32)
    opened.set_progress_bar_config(disable=True)
    return opened


def expect(theirs: Any, sampler: str, generator: Any, images: int) -> NDArray[np.uint8]:
    theirs.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(theirs.scheduler.config)
    pictures = theirs(
        PROMPTS,
        negative_prompt=NEGATIVES,
        num_inference_steps=3,
        num_images_per_prompt=images,
        guidance_scale=4.0,
        width=48,
        height=32,
        generator=generator,
        output_type="np",
    ).images
    return np.round(pictures * 255).astype(np.uint8)


def psnr(pictures: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """PSNR in dB of the worst picture."""
    assert pictures.shape == expected.shape
    errors = np.square(pictures.astype(np.float64) - expected).mean(axis=(1, 2, 3))
    return float(10 * np.log10(255**2 / max(errors.max(), 1e-9)))


OPTIONS: dict[str, Any] = {"negative_prompt": NEGATIVES, "steps": 3, "guidance": 4.0, "width": 48, "height": 32}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("loop", ["fused", "plain"])
def test_two_prompts_of_two_pictures_are_diffusers(
    pipe: Pipeline, theirs: Any, tiny: Any, kind: str, sampler: str, loop: str
) -> None:
    """One seed for all is diffusers' one generator, in the noise of every step too; results come prompt by prompt."""
    expected = expect(theirs, sampler, torch.Generator().manual_seed(7), 2)
    ask = {**OPTIONS, "sampler": sampler, "seed": 7, "images": 2}
    if loop == "fused":
        results = pipe.batch(PROMPTS, **ask)
    else:
        with Pipeline.load(tiny.bundle(kind), "onnxruntime", loop="plain") as plain:
            results = plain.batch(PROMPTS, **ask)
    assert [result.request.prompt for result in results] == PROMPTS
    assert [result.images.shape for result in results] == [(2, 32, 48, 3)] * 2
    assert psnr(np.concatenate([result.images for result in results]), expected) >= GATE
    assert psnr(expected[2:], expected[:2]) < 30, "prompts must make a difference"


def test_a_seed_for_each_prompt(pipe: Pipeline, theirs: Any) -> None:
    """Seeds of their own are diffusers' list of generators, and give each prompt the picture that it has alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 9)]
    results = pipe.batch(PROMPTS, **OPTIONS, sampler="euler-a", seed=[3, 9])
    assert psnr(np.concatenate([result.images for result in results]), expect(theirs, "euler-a", generators, 1)) >= GATE
    for result, prompt, negative, seed in zip(results, PROMPTS, NEGATIVES, (3, 9), strict=True):
        options = {**OPTIONS, "negative_prompt": negative, "sampler": "euler-a", "seed": seed}
        assert (result.request.seed, result.request.negative_prompt) == (seed, negative)
        np.testing.assert_allclose(result.latents, pipe(prompt, **options).latents, atol=1e-4)


def test_no_seed_is_one_of_its_own_for_each(pipe: Pipeline) -> None:
    """Without a seed every result says with which one it can be drawn again alone."""
    results = pipe.batch([PROMPTS[0]] * 2, steps=1)
    assert results[0].request.seed != results[1].request.seed
    again = pipe(PROMPTS[0], steps=1, seed=results[1].request.seed)
    np.testing.assert_allclose(again.latents, results[1].latents, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "loop", "most"), [("sd1", "fused", 1), ("sd1", "plain", 2), ("sd1", "fused", 3), ("sdxl", "fused", 2)]
)
def test_small_calls_give_the_same_pictures(tiny: Any, model: str, loop: str, most: int) -> None:
    """Three pictures of two prompts in calls of at most so many are those of one call, with noise in every step."""
    options: dict[str, Any] = {**OPTIONS, "sampler": "euler-a", "seed": 7, "images": 3, "guidance_end": 0.5}
    path = tiny.bundle(model)
    with Pipeline.load(path, "onnxruntime", loop=loop) as whole:
        expected = whole.batch(PROMPTS, **options)
        single = whole(PROMPTS[0], steps=2, seed=7, images=3)
    with Pipeline.load(path, "onnxruntime", loop=loop, max_batch=most) as pipe:
        denoiser = "unet_step" if loop == "fused" else "unet"
        pictures = {name: _count(pipe, name) for name in (denoiser, "vae_decoder")}
        for result, one in zip(pipe.batch(PROMPTS, **options), expected, strict=True):
            np.testing.assert_allclose(result.latents, one.latents, atol=1e-4)
            assert int(np.abs(result.images.astype(int) - one.images).max()) <= 1
        assert len(pictures["vae_decoder"]) == 6 // most
        assert max(pictures["vae_decoder"]) == most
        assert len(pictures[denoiser]) == 3 * 6 // most
        assert max(pictures[denoiser]) == most * (2 if loop == "plain" else 1)
        np.testing.assert_allclose(pipe(PROMPTS[0], steps=2, seed=7, images=3).latents, single.latents, atol=1e-4)


def _count(pipe: Pipeline, component: str) -> list[int]:
    """Rows of each call of a component from now on."""
    engine, rows = pipe.engines[component], []
    run = engine.run

    def counted(feeds: Any) -> Any:
        first = "registers" if component.endswith("_step") else next(iter(feeds))
        rows.append(len(feeds[first]))
        return run(feeds)

    engine.run = counted  # type: ignore[method-assign]
    return rows


def test_a_batch_that_fails_has_not_moved(tiny_bundles: dict[str, Path]) -> None:
    """If the second of two calls fails, no run has moved, and the step may be taken again."""
    graph = Bundle.open(tiny_bundles["sd1"]).graph("unet", "opset20-fp32")
    fails = True

    def denoise(feeds: Any) -> dict[str, Any]:
        if fails and len(unet.calls) == 2:
            raise EngineError("out of luck")
        return {"out_sample": np.zeros_like(feeds["sample"])}

    unet = FakeEngine(graph.inputs, graph.outputs, denoise).open()
    with (
        Pipeline.load(tiny_bundles["sd1"], "onnxruntime", loop="plain") as loaded,
        Pipeline(loaded.bundle, {**loaded.engines, "unet": unet}, max_batch=1) as pipe,
    ):
        runs = [pipe.start("a red apple", seed=1, steps=2, sampler="euler-a") for _ in range(2)]
        before = [run.latents.copy() for run in runs]
        with pytest.raises(EngineError, match="out of luck"):
            pipe.advance(runs)
        for run, latents in zip(runs, before, strict=True):
            assert run.index == 0
            np.testing.assert_array_equal(run.latents, latents)
        fails = False
        pipe.advance(runs)
        assert [run.index for run in runs] == [1, 1]
        np.testing.assert_array_equal(runs[0].latents, runs[1].latents)


def test_the_stream_of_a_batch(pipe: Pipeline) -> None:
    """Every step shows the latents of all pictures, prompt by prompt; at the end there is a result for each."""
    stream = pipe.stream_batch(PROMPTS, steps=2, sampler="euler", seed=7, images=2)
    steps = []
    while True:
        try:
            steps.append(next(stream))
        except StopIteration as stop:
            results = stop.value
            break
    assert [step.index for step in steps] == [0, 1]
    np.testing.assert_array_equal(steps[-1].latents, np.concatenate([result.latents for result in results]))
    assert results[0].timings == results[1].timings
    assert len(results[0].timings.step) == 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("a red apple", {}, "prompts is a str, expected a list of strings"),
        ([], {}, "0 prompts are given, expected 1 to 4096"),
        (PROMPTS, {"seed": [1, 2, 3]}, "seed has 3 entries for 2 prompts; give one for each, or one for all"),
        (PROMPTS, {"negative_prompt": ["a leaf"]}, "negative_prompt has 1 entries for 2 prompts"),
        ([PROMPTS[0], 7], {}, "prompt is a int, expected a string"),
        (PROMPTS, {"seed": [1, -1]}, "seed is -1, expected 0 to"),
        (PROMPTS, {"images": 200, "width": 1024, "height": 1024}, "400 images of 1024x1024 have 419,430,400 pixels"),
    ],
)
def test_wrong_batches_are_refused(pipe: Pipeline, prompts: Any, options: dict[str, Any], message: str) -> None:
    """What does not fit together is refused before anything is computed."""
    with pytest.raises(InvalidRequestError, match=message):
        pipe.stream_batch(prompts, **options)


@pytest.mark.parametrize("most", [0, -1, 1.5, True])
def test_a_wrong_limit_is_refused(tiny_bundles: dict[str, Path], most: Any) -> None:
    """A limit is a number of pictures, and one, and not less than what engines are made for."""
    with pytest.raises(
        InvalidRequestError, match=r"max_batch is .*, expected (a whole number|1 or more images, or None)"
    ):
        Pipeline.load(tiny_bundles["sd1"], "onnxruntime", max_batch=most)
    with pytest.raises(InvalidRequestError, match="max_batch is 1, and engines for 2 images are asked for"):
        Pipeline.load(tiny_bundles["sd1"], "onnxruntime", max_batch=1, fixed_size=(None, None, 2))


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 5), (1, 1, 3)])
def test_shared_noise_is_one_draw_of_torchs(shape: tuple[int, ...]) -> None:
    """Members get the rows of what torch draws at once for all, in any order, also where lengths fit no block."""
    generator = torch.Generator().manual_seed(7)
    expected = [torch.randn(5, *shape, generator=generator).numpy() for _ in range(3)]
    first, second = SharedNoise(TorchGenerator(7), [2, 3]).members()
    received = [first.randn((2, *shape)), first.randn((2, *shape)), second.randn((3, *shape))]
    received += [second.randn((3, *shape)), second.randn((3, *shape)), first.randn((2, *shape))]
    rows = [expected[0][:2], expected[1][:2], expected[0][2:], expected[1][2:], expected[2][2:], expected[2][:2]]
    for one, other in zip(received, rows, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-7)
