"""Pictures against diffusers' StableDiffusionPipeline: same checkpoint, prompt, seed, scheduler, steps and guidance."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentrt.runtime import Pipeline

GATE = 45.0
"""Least PSNR in dB, on uint8 pictures."""
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
}
PROMPT, NEGATIVE = "a red apple", "a green leaf"


@dataclass(frozen=True)
class Pair:
    """One checkpoint, opened here and in diffusers.

    Attributes:
        ours: The pipeline over its bundle, by the way it runs the loop.
        theirs: diffusers' pipeline, in fp32.
        sizes: Widths and heights to draw: the model's own, a wide one, a tall one.
    """

    ours: dict[str, Pipeline]
    theirs: diffusers.StableDiffusionPipeline
    sizes: tuple[tuple[int, int], ...]

    def compare(self, sampler: str, *, size: tuple[int, int], images: int, steps: int, **options: Any) -> float:
        """PSNR in dB of the worst picture."""
        width, height = size
        common = {"negative_prompt": NEGATIVE, "width": width, "height": height, **options}
        settings = {"sampler": sampler, "steps": steps, "images": images, "seed": 7, "guidance": 4.0}
        ours = {loop: pipe(PROMPT, **settings, **common).images for loop, pipe in self.ours.items()}
        if "clip_skip" in common and not common["clip_skip"]:
            del common["clip_skip"]
        self.theirs.scheduler = scheduler(sampler, self.theirs.scheduler.config)
        theirs = self.theirs(
            PROMPT,
            num_inference_steps=steps,
            num_images_per_prompt=images,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
            **common,
        ).images
        expected = np.round(theirs * 255).astype(np.uint8)
        assert {pictures.shape for pictures in ours.values()} == {expected.shape} == {(images, height, width, 3)}
        assert len(np.unique(expected)) > 16, "a flat picture would make the comparison easy"
        return min(psnr(a, b) for pictures in ours.values() for a, b in zip(pictures, expected, strict=True))


def scheduler(sampler: str, config: Any) -> Any:
    """The diffusers scheduler of a sampler, from another scheduler's config as users switch them.

    Left to itself, diffusers' DDIM clips latents to [-1, 1] where a config does not name ``clip_sample``. That is meant
    for pixels and spoils latents; Stable Diffusion's own configs switch it off, and so do we.
    """
    settings = {"clip_sample": False} if sampler == "ddim" else {}
    return getattr(diffusers, SCHEDULERS[sampler]).from_config(config, **settings)


def psnr(picture: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB."""
    error = np.mean((picture.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@functools.cache
def open_theirs(path: Path) -> diffusers.StableDiffusionPipeline:
    """diffusers' pipeline in fp32."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        path, torch_dtype=torch.float32, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    if not hasattr(pipe.text_encoder, "text_model"):  # transformers 5 moved what clip_skip looks for
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    return pipe


@pytest.fixture(scope="module", params=["emoji", "sd1", "sd2"])
def pair(
    request: pytest.FixtureRequest,
    emoji_source: Path,
    emoji_bundle: Path,
    tiny_sources: dict[str, Path],
    tiny_bundles: dict[str, Path],
) -> Iterator[Pair]:
    """The emoji model, a random SD 1.x style model and a random SD 2.x style one with v prediction."""
    source = {"emoji": emoji_source, **tiny_sources}[request.param]
    bundle = {"emoji": emoji_bundle, **tiny_bundles}[request.param]
    sizes = ((64, 64), (96, 64), (64, 80)) if request.param == "emoji" else ((32, 32), (48, 32), (24, 40))
    with Pipeline.load(bundle, "onnxruntime") as fused, Pipeline.load(bundle, "onnxruntime", loop="plain") as plain:
        yield Pair({"fused": fused, "plain": plain}, open_theirs(source), sizes)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_picture_is_diffusers(pair: Pair, sampler: str, steps: int) -> None:
    """A picture of the model's own size is diffusers' picture."""
    assert pair.compare(sampler, size=pair.sizes[0], images=1, steps=steps) >= GATE


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures_of_other_shapes_are_diffusers(pair: Pair, sampler: str, size: int) -> None:
    """Three pictures at a time, wide or tall, are diffusers' pictures."""
    assert pair.compare(sampler, size=pair.sizes[size], images=3, steps=4) >= GATE


@pytest.mark.parametrize(("width", "height"), [(10, 6), (13, 9), (7, 5)])
def test_pictures_of_odd_sizes_are_diffusers(
    pair: Pair, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents that the U-Net cannot halve evenly, some at its lower levels and some at once, give diffusers' picture.

    diffusers' pipeline asks for multiples of 8 pixels whatever the autoencoder; its U-Net takes every size.
    """
    monkeypatch.setattr(pair.theirs, "check_inputs", lambda *args, **options: None)
    factor = pair.ours["fused"].manifest.latent.vae_scale_factor
    assert pair.compare("euler", size=(width * factor, height * factor), images=2, steps=3) >= GATE


@pytest.mark.parametrize("options", [{"clip_skip": 1}, {"negative_prompt": ""}], ids=["clip-skip", "no-negative"])
def test_options_mean_what_they_mean_in_diffusers(pair: Pair, options: dict[str, Any]) -> None:
    """clip_skip and an empty negative prompt give diffusers' picture."""
    assert pair.compare("dpmpp-2m", size=pair.sizes[0], images=1, steps=4, **options) >= GATE


@pytest.mark.parametrize(
    ("sampler", "theirs", "options"),
    [
        ("ddim", {"eta": 0.5}, {"eta": 0.5}),
        ("dpmpp-2m", {"timesteps": [950, 700, 300, 40]}, {"timesteps": [950, 700, 300, 40], "steps": None}),
        ("euler", {"sigmas": [12.0, 4.0, 1.0, 0.2]}, {"sigmas": [12.0, 4.0, 1.0, 0.2], "steps": None}),
    ],
    ids=["eta", "timesteps", "sigmas"],
)
def test_a_schedule_of_ones_own_is_diffusers(
    pair: Pair, sampler: str, theirs: dict[str, Any], options: dict[str, Any]
) -> None:
    """eta, timesteps and sigmas give diffusers' picture."""
    width, height = pair.sizes[0]
    common = {"negative_prompt": NEGATIVE, "width": width, "height": height}
    settings = {"guidance": 4.0, "steps": 4, "seed": 3, "sampler": sampler, **options}
    ours = [pipe(PROMPT, **settings, **common).images[0] for pipe in pair.ours.values()]
    pair.theirs.scheduler = scheduler(sampler, pair.theirs.scheduler.config)
    picture = pair.theirs(
        PROMPT,
        guidance_scale=4.0,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **theirs,
        **common,
    ).images[0]
    expected = np.round(picture * 255).astype(np.uint8)
    assert min(psnr(each, expected) for each in ours) >= GATE


def test_without_guidance_the_picture_is_diffusers(pair: Pair) -> None:
    """At guidance 1 neither side runs the unconditional half, and the pictures agree."""
    common = {"negative_prompt": NEGATIVE, "guidance": 1.0, "steps": 4, "seed": 3, "sampler": "euler"}
    ours = [pipe(PROMPT, **common).images[0] for pipe in pair.ours.values()]
    pair.theirs.scheduler = scheduler("euler", pair.theirs.scheduler.config)
    width, height = pair.sizes[0]
    theirs = pair.theirs(
        PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=1.0,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        width=width,
        height=height,
    ).images[0]
    expected = np.round(theirs * 255).astype(np.uint8)
    assert min(psnr(picture, expected) for picture in ours) >= GATE


def test_rescaled_guidance_is_diffusers(pair: Pair) -> None:
    """guidance_rescale gives diffusers' picture."""
    assert pair.compare("ddim", size=pair.sizes[0], images=3, steps=4, guidance_rescale=0.7) >= GATE


def test_guidance_that_ends_is_diffusers(pair: Pair) -> None:
    """guidance_end gives the picture that diffusers draws when a callback ends guidance in the middle."""

    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    width, height = pair.sizes[0]
    common = {"negative_prompt": NEGATIVE, "width": width, "height": height}
    settings = {"guidance": 4.0, "guidance_end": 0.5, "steps": 4, "seed": 3, "sampler": "euler"}
    ours = [pipe(PROMPT, **settings, **common).images[0] for pipe in pair.ours.values()]
    pair.theirs.scheduler = scheduler("euler", pair.theirs.scheduler.config)
    theirs = pair.theirs(
        PROMPT,
        guidance_scale=4.0,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        callback_on_step_end=stop,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **common,
    ).images[0]
    expected = np.round(theirs * 255).astype(np.uint8)
    assert min(psnr(picture, expected) for picture in ours) >= GATE
