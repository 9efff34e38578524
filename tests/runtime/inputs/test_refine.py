"""A base model and its refiner draw one image, and a run begins with ``latents`` that a caller gives."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Pipeline
from latentrt.runtime.bundle.manifest import Component
from latentrt.runtime.cli import main
from latentrt.runtime.inputs.refine import hand_over_options

GATE = 45.0  # dB
PROMPT, NEGATIVE, STEPS, SEED = "a red apple", "a green leaf", 6, 7
SAMPLERS = {"euler": "EulerDiscreteScheduler", "dpmpp-2m": "DPMSolverMultistepScheduler"}


@pytest.fixture(scope="module")
def models(tiny: Any) -> Iterator[dict[str, Pipeline]]:
    """Base and refiner, opened."""
    with (
        Pipeline.load(tiny.bundle("sdxl"), "onnxruntime") as base,
        Pipeline.load(tiny.bundle("sdxl-refiner"), "onnxruntime") as refiner,
    ):
        yield {"base": base, "refiner": refiner}


@pytest.fixture(scope="module")
def theirs(tiny: Any) -> tuple[Any, Any]:
    """The two in diffusers."""
    pipes = (
        diffusers.StableDiffusionXLPipeline.from_pretrained(tiny.source("sdxl")),
        diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny.source("sdxl-refiner")),
    )
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def psnr(pictures: np.ndarray, expected: np.ndarray) -> float:
    errors = np.square(pictures.astype(np.float64) - expected).mean(axis=(1, 2, 3))
    return float(10 * np.log10(255**2 / max(errors.max(), 1e-9)))


@pytest.mark.heavy
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("size", "images"), [((32, 32), 3), ((48, 24), 1)])
def test_the_two_draw_the_pictures_of_diffusers(
    models: dict[str, Pipeline], theirs: tuple[Any, Any], sampler: str, size: tuple[int, int], images: int
) -> None:
    """The base ends with diffusers' latents, and the refiner, which goes on from them, with its pictures."""
    asked = {"negative_prompt": NEGATIVE, "steps": STEPS, "sampler": sampler, "guidance": 4.0}
    options = {**asked, "seed": SEED, "width": size[0], "height": size[1], "images": images}
    own, rest = hand_over_options(models["base"].manifest, models["refiner"].manifest, PROMPT, options, 0.6)
    first = models["base"](PROMPT, **own)
    assert first.images.shape == (0, size[1], size[0], 3)
    drawn = models["refiner"](PROMPT, **rest, latents=first.latents)
    for pipe in theirs:
        pipe.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(pipe.scheduler.config)
    usual = {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": 4.0}
    latents = theirs[0](
        PROMPT,
        width=size[0],
        height=size[1],
        num_images_per_prompt=images,
        denoising_end=0.6,
        output_type="latent",
        generator=torch.Generator().manual_seed(SEED),
        **usual,
    ).images
    assert np.abs(first.latents - latents.numpy()).max() < 1e-3 * np.abs(latents.numpy()).max()
    pictures = theirs[1](
        PROMPT, image=latents, num_images_per_prompt=images, denoising_start=0.6, output_type="np", **usual
    ).images
    expected = np.round(pictures * 255).astype(np.uint8)
    assert drawn.images.shape == expected.shape
    assert psnr(drawn.images, expected) >= GATE
    alone = models["base"](PROMPT, **options).images
    assert psnr(alone, expected) < GATE, "the refiner makes no difference"


def test_a_run_in_two_parts_is_the_whole_run(models: dict[str, Pipeline]) -> None:
    """With a sampler that keeps no history, one model goes on from its own latents as if it had not stopped."""
    pipe, options = models["base"], {"steps": 5, "sampler": "heun", "width": 32, "height": 32, "seed": 3}
    whole = pipe("a red apple", **options)
    left = pipe("a red apple", **options, denoising_end=0.5)
    rest = pipe("a red apple", **options, denoising_start=0.5, latents=left.latents)
    assert len(left.timings.step) + len(rest.timings.step) == len(whole.timings.step)
    np.testing.assert_allclose(rest.latents, whole.latents, atol=1e-4)
    assert left.images.size == 0
    shown = pipe("a red apple", **options, denoising_end=0.5, output="image")
    assert shown.images.shape == (1, 32, 32, 3)


def test_latents_are_the_noise_of_a_run_from_its_start(models: dict[str, Pipeline]) -> None:
    """Without denoising_start they stand for the seed's noise, decide the size, and are repeated for more pictures."""
    pipe, noise = models["base"], np.random.default_rng(0).normal(size=(1, 4, 8, 16))
    drawn = pipe("a red apple", steps=2, latents=noise, images=2)
    assert drawn.images.shape == (2, 16, 32, 3)
    np.testing.assert_allclose(drawn.latents[0], drawn.latents[1], atol=1e-5)
    generator = torch.Generator().manual_seed(5)
    seeded = torch.randn((1, 4, 8, 16), generator=generator).numpy()
    one = pipe("a red apple", steps=2, latents=seeded)
    other = pipe("a red apple", steps=2, seed=5, width=32, height=16)
    np.testing.assert_array_equal(one.images, other.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denoising_start": 0.8}, "denoising_start is 0.8, but there is nothing to go on from"),
        ({"latents": "noise"}, "latents are a str, expected an array of numbers"),
        ({"latents": np.zeros((4, 8, 8))}, r"latents have the shape \[4, 8, 8\], expected \[images, 4, height / 2"),
        ({"latents": np.zeros((1, 3, 8, 8))}, r"latents have the shape \[1, 3, 8, 8\]"),
        ({"latents": np.full((1, 4, 8, 8), np.nan)}, "latents hold NaN or infinity"),
        ({"latents": np.zeros((1, 4, 8, 8)), "width": 32}, "width is 32, but the latents' is 16"),
        ({"latents": np.zeros((2, 4, 8, 8)), "images": 3}, "images is 3, but 2 latents are given"),
        ({"denoising_end": 1.5}, "denoising_end is 1.5, expected a number between 0 and 1"),
        ({"output": "video"}, "output is 'video', expected image or latent"),
        ({"aesthetic_score": 6}, "have no aesthetic_score, only stable-diffusion-xl-refiner"),
    ],
)
def test_what_a_run_cannot_begin_or_end_with(
    models: dict[str, Pipeline], options: dict[str, Any], message: str
) -> None:
    """The sentence says what was received and what is expected."""
    with pytest.raises(InvalidRequestError, match=message):
        models["base"]("a red apple", **options)


def test_the_options_of_both_models(models: dict[str, Pipeline]) -> None:
    """Each gets what its family has; sampler, steps and size are the base's, and what neither has is refused."""
    base, refiner = models["base"].manifest, models["refiner"].manifest
    asked = {"prompt_2": "oil", "aesthetic_score": 7.0, "crop": (4, 0), "seed": 2**64 - 1, "steps": 5}
    own, rest = hand_over_options(base, refiner, PROMPT, asked)
    assert (own["prompt_2"], own["crop"], own["denoising_end"], own["seed"]) == ("oil", (4, 0), 0.8, 2**64 - 1)
    assert (rest["aesthetic_score"], rest["crop"], rest["denoising_start"], rest["seed"]) == (7.0, (4, 0), 0.8, 0)
    assert (rest["steps"], rest["sampler"], rest["width"]) == (5, base.defaults.sampler, base.defaults.width)
    assert "aesthetic_score" not in own
    assert "prompt_2" not in rest
    with pytest.raises(InvalidRequestError, match="none of the 2 steps of euler begins after denoising_start"):
        hand_over_options(base, refiner, PROMPT, {"steps": 2, "sampler": "euler"}, 0.9995)


def test_pictures_are_checked_by_the_bundle_that_draws_them(models: dict[str, Pipeline]) -> None:
    """The base ends in latents, which cannot be looked at; a refiner without a safety checker refuses."""
    base, refiner = models["base"].manifest, models["refiner"].manifest
    with pytest.raises(InvalidRequestError, match="the bundle has no safety checker; build it again with --safety"):
        hand_over_options(base, refiner, PROMPT, {"safety": "black"})
    checked = dataclasses.replace(refiner, components={**refiner.components, "safety_checker": Component("", {})})
    own, rest = hand_over_options(base, checked, PROMPT, {"safety": "black"})
    assert (own["safety"], rest["safety"]) == (None, "black")


def test_a_refiner_of_another_model_is_refused(models: dict[str, Pipeline], tiny: Any) -> None:
    """Latents of another scale are not handed over."""
    base = models["base"].manifest
    other = dataclasses.replace(models["refiner"].manifest, latent=dataclasses.replace(base.latent, scaling=1.0))
    with pytest.raises(InvalidRequestError, match="differ in number or scale; give a refiner"):
        hand_over_options(base, other, PROMPT, {})


def test_the_command_line_draws_with_both(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture is that of the two requests, and its parameters name the refiner."""
    output = tmp_path / "apple.png"
    base, refiner = str(tiny.bundle("sdxl")), str(tiny.bundle("sdxl-refiner"))
    command = ["generate", base, PROMPT, "--output", str(output), "--steps", "5", "--seed", "7", "--width", "32"]
    command += ["--height", "32", "--refiner", refiner, "--hand-over", "0.6", "--aesthetic-score", "8", "--json"]
    command += ["--engine", "onnxruntime"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["request"]["denoising_end"] == told["refiner"]["request"]["denoising_start"] == 0.6
    assert told["refiner"]["request"]["aesthetic_score"] == 8
    with Image.open(output) as picture:
        assert picture.size == (32, 32)
        assert "Refiner: sdxl-refiner, Hand over: 0.6" in picture.text["parameters"]  # type: ignore[attr-defined]
    assert main(["generate", base, PROMPT, "--output", str(output), "--hand-over", "0.6"]) == 2
    assert "--hand-over is for two models" in capsys.readouterr().err
