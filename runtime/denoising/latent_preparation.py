"""The latents that a run begins with: noise, an encoded image, or latents that the caller gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..bundle.manifest import Latent
from ..engine_calls import Conditioning, Floats
from ..images.masks import InputImages
from ..request.request import Request
from ..samplers.noise import Noise, TorchGenerator, varied_noise
from ..samplers.plan import Plan
from .run import InpaintBlend, PreparedLatents, Run


def start_run(
    request: Request,
    plan: Plan,
    conditioning: Sequence[Conditioning],
    shape: tuple[int, ...],
    generator: Noise | None = None,
    latents: Floats | None = None,
    begun: PreparedLatents | None = None,
) -> Run:
    """A run before its first step, with noise from the request's seed or from latents that are there.

    Args:
        request: The request.
        plan: Its sampler's plan.
        conditioning: The conditioning of its texts, the unconditional one first if the request is guided.
        shape: The shape of its latents, the images first, such as images, channels, height, width.
        generator: The source of all its noise; ``None`` makes one from the request's seed.
        latents: Unit normal noise in place of the seed's; or, with ``denoising_start``, the latents that the run goes
            on from.
        begun: The prepared latents to begin with, if the request has an image; noise and ``latents`` are then not used.
    """
    generator = generator or TorchGenerator(request.seed)
    registers = np.zeros((shape[0], plan.registers, *shape[1:]), np.float32)
    if begun is not None:
        registers[:, 0] = begun.latents
    elif latents is not None and request.denoising_start is not None:
        registers[:, 0] = latents
    else:
        seed, strength = request.variation_seed, request.variation_strength
        noise = varied_noise(generator, shape, seed, strength) if latents is None else latents
        np.multiply(noise, np.float32(plan.init_scale), out=registers[:, 0])
    rows = {
        name: np.concatenate([text[name].repeat(request.images, axis=0) for text in conditioning])
        for name in conditioning[-1]
    }
    return Run(request, plan, conditioning, generator, registers, rows=rows, begun=begun)


def begin_from(
    request: Request,
    plan: Plan,
    given: InputImages,
    latent: Latent,
    shape: tuple[int, ...],
    stream: Noise,
    encode: Callable[[Floats], Floats],
    *,
    inpaints: bool = False,
) -> PreparedLatents:
    """The latents that a run begins with if its request has an image, with noise drawn in diffusers' order.

    Args:
        request: The request.
        plan: Its sampler's plan, without the steps that the strength leaves out.
        given: Its image, and maybe a mask.
        latent: The model's latent space.
        shape: The shape of the run's latents, the images first.
        stream: The source of all the run's noise.
        encode: The VAE's encoder: pixels ``[1, 3, height, width]`` from -1 to 1 to mean and log variance.
        inpaints: Whether the denoiser takes the mask, and the image outside of it, as inputs.

    Raises:
        EngineError: if the encoder fails.
    """
    pixels = given.image.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255) * 2 - 1
    pure = given.mask is not None and request.strength == 1
    sample = None if pure and inpaints else _encoded(encode(pixels), latent, stream)
    noise = varied_noise(stream, shape, request.variation_seed, request.variation_strength)
    latents = noise * np.float32(plan.init_scale) if pure or sample is None else plan.noised(0, sample, noise)
    if given.mask is None:
        return PreparedLatents(latents, paste=given.paste)
    mask = given.mask[:: latent.vae_scale_factor, :: latent.vae_scale_factor].astype(np.float32)[None, None]
    if not inpaints:
        # diffusers encodes the image outside of the mask for these models too, and does not use it; the draw that this
        # takes is drawn here as well, so that the noise after it is the same.
        stream.randn((1, *shape[1:]))
        assert sample is not None
        return PreparedLatents(latents, InpaintBlend(sample, noise, mask), given.paste)
    outside = _encoded(encode(pixels * ~given.mask), latent, stream)
    return PreparedLatents(
        latents, paste=given.paste, conditioning={"inpaint": np.concatenate([mask, outside], axis=1)}
    )


def _encoded(parameters: Floats, latent: Latent, stream: Noise) -> Floats:
    """A sample of the encoder's Gaussian, scaled as the denoiser knows it."""
    mean, log_variance = np.split(parameters, 2, axis=1)
    deviation = np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20))
    sample: Floats = mean + deviation * stream.randn(mean.shape)
    return (sample - np.float32(latent.shift)) * np.float32(latent.scaling)
