"""Latents that a run begins with: torch's noise, a caller's, or an image as diffusers' Gaussian samples it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latentrt.runtime.bundle.manifest import Latent
from latentrt.runtime.denoising.latent_preparation import begin_from, start_run
from latentrt.runtime.denoising.run import PreparedLatents
from latentrt.runtime.engine_calls import Floats
from latentrt.runtime.images.masks import InputImages
from latentrt.runtime.request.request import Request
from latentrt.runtime.samplers import Plan, compile_plan
from latentrt.runtime.samplers.noise import TorchGenerator

SHAPE = (2, 4, 4, 6)
LATENT = Latent(channels=4, vae_scale_factor=8, scaling=0.5, shift=0.25)
CONDITIONING = [{"text": np.zeros((1, 3), np.float32)}, {"text": np.ones((1, 3), np.float32)}]


def request(**options: Any) -> Request:
    return Request("p", "n", 4, 5.0, 7, "euler", 48, 32, 2, 0, **options)


def plan() -> Plan:
    return compile_plan("euler", {"_class_name": "EulerDiscreteScheduler"}, 4)


def torchs(generator: torch.Generator, *shape: int) -> Floats:
    return torch.randn(shape, generator=generator).numpy()


def encode(pixels: Floats) -> Floats:
    """Mean and log variance that depend on the pixels."""
    small = pixels[:, :, ::8, ::8].mean(axis=1, keepdims=True)
    return np.concatenate([small.repeat(4, axis=1), small.repeat(4, axis=1) / 3], axis=1).astype(np.float32)


def test_a_run_begins_with_the_noise_of_its_seed() -> None:
    """The first register is torch's noise at the plan's scale, and each image has its row of each text."""
    run = start_run(request(), plan(), CONDITIONING, SHAPE)
    noise = torchs(torch.Generator().manual_seed(7), *SHAPE)
    np.testing.assert_allclose(run.latents, noise * plan().init_scale, rtol=1e-6)
    np.testing.assert_array_equal(run.rows["text"][:, 0], [0, 0, 1, 1])


def test_latents_of_a_caller_are_noise_or_a_state() -> None:
    """At the start they are scaled as noise is; with denoising_start they are taken as they are."""
    given = torchs(torch.Generator().manual_seed(1), *SHAPE)
    run = start_run(request(), plan(), CONDITIONING, SHAPE, latents=given)
    np.testing.assert_allclose(run.latents, given * np.float32(plan().init_scale), rtol=1e-6)
    run = start_run(request(denoising_start=0.5), plan(), CONDITIONING, SHAPE, latents=given)
    np.testing.assert_array_equal(run.latents, given)
    begun = PreparedLatents(given + 1)
    run = start_run(request(), plan(), CONDITIONING, SHAPE, latents=given, begun=begun)
    np.testing.assert_array_equal(run.latents, given + 1)


def image(mask: bool) -> InputImages:
    """An image of noise, whose right half is painted if it has a mask."""
    pixels = np.random.default_rng(3).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    painted = np.zeros((32, 48), bool)
    painted[:, 24:] = True
    return InputImages(pixels, painted if mask else None)


def sampled(given: InputImages, generator: torch.Generator, *, outside: bool = False) -> Floats:
    """A sample of the image's latents, as diffusers draws it and its pipelines scale it."""
    pixels = given.image.transpose(2, 0, 1)[None] / np.float32(127.5) - 1
    pixels = pixels * ~given.mask if outside and given.mask is not None else pixels
    distribution = DiagonalGaussianDistribution(torch.from_numpy(encode(pixels.astype(np.float32))))
    return (distribution.sample(generator).numpy() - LATENT.shift) * LATENT.scaling


def test_an_image_is_sampled_and_noised_as_in_diffusers() -> None:
    """First the Gaussian's draw, then the run's noise, at the noise level of the first step."""
    begun = begin_from(request(strength=0.5), plan(), image(mask=False), LATENT, SHAPE, TorchGenerator(7), encode)
    generator = torch.Generator().manual_seed(7)
    sample = sampled(image(mask=False), generator)
    noise = torchs(generator, *SHAPE)
    scheduler_level = plan().init_scale  # of the first step, where the level is far above one
    np.testing.assert_allclose(begun.latents, plan().noised(0, sample, noise), rtol=1e-4, atol=1e-4)
    assert np.abs(begun.latents - sample).std() == pytest.approx(np.abs(noise).std() * scheduler_level, rel=0.01)
    assert (begun.kept, begun.conditioning) == (None, {})


def test_a_mask_keeps_what_is_outside_of_it() -> None:
    """The part to put back has the image's latents, the run's noise, and the mask at the latents' size."""
    begun = begin_from(request(strength=0.5), plan(), image(mask=True), LATENT, SHAPE, TorchGenerator(7), encode)
    generator = torch.Generator().manual_seed(7)
    sample, noise = sampled(image(mask=True), generator), torchs(generator, *SHAPE)
    assert begun.kept is not None
    np.testing.assert_allclose(begun.kept.sample, sample, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(begun.kept.noise, noise, atol=1e-6)
    np.testing.assert_array_equal(begun.kept.mask[0, 0], [[0, 0, 0, 1, 1, 1]] * 4)


def test_a_denoiser_for_inpainting_gets_mask_and_outside_as_inputs() -> None:
    """At full strength it begins with pure noise; its inputs are the mask and the masked image's latents."""
    begun = begin_from(
        request(strength=1.0), plan(), image(mask=True), LATENT, SHAPE, TorchGenerator(7), encode, inpaints=True
    )
    generator = torch.Generator().manual_seed(7)
    noise = torchs(generator, *SHAPE)
    outside = sampled(image(mask=True), generator, outside=True)
    np.testing.assert_allclose(begun.latents, noise * plan().init_scale, rtol=1e-5)
    assert begun.kept is None
    inputs = begun.conditioning["inpaint"]
    assert inputs.shape == (1, 5, 4, 6)
    np.testing.assert_array_equal(inputs[0, 0], [[0, 0, 0, 1, 1, 1]] * 4)
    np.testing.assert_allclose(inputs[:, 1:], outside, rtol=1e-4, atol=1e-5)
