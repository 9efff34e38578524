"""The VAE on images: latents to pixels, and pixels to the distribution of their latents; whole, in parts, in tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.checks import check_choice
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import TINY_DECODER, VAE_ENCODER, Latent, Manifest
from ..engine_calls import Floats, output_of
from .tiling import Tiling, decode_tiles, encode_tiles

DECODERS = ("full", "tiny")
"""The decoders of images: the model's own, and that of a tiny autoencoder."""


def decode_latents(
    engine: Callable[[str], Engine],
    manifest: Manifest,
    latents: Floats,
    tiling: Tiling | None = None,
    decoder: str | None = None,
    most: int | None = None,
) -> NDArray[np.uint8]:
    """Decode latents of images.

    Args:
        engine: Gives the opened engine of a component.
        manifest: The bundle's.
        latents: float32 ``[images, channels, h, w]``, scaled as the denoiser has them.
        tiling: How to cut large images; ``None`` decodes them whole.
        decoder: One of :data:`DECODERS`; ``None`` is the full one.
        most: Most images to decode at a time; ``None`` sets no limit.

    Returns:
        Pixels, uint8 ``[images, height, width, 3]``.

    Raises:
        InvalidRequestError: if there is no such decoder.
        EngineError: if the engine fails, or computes values that are not finite.
    """
    latent, component, sample = manifest.latent, "vae_decoder", latents
    if check_decoder(manifest, decoder) == "tiny":
        component = TINY_DECODER  # takes the denoiser's latents as they are
    else:
        sample = unscaled(latent, latents)
    decoded = functools.partial(_decoded, engine(component), component)
    height, width = (latent.vae_scale_factor * length for length in latents.shape[2:])
    cut = tiling if tiling is not None and tiling.splits(width, height) else None
    most = most or max(len(sample), 1)
    parts = []
    for part in np.split(sample, range(most, len(sample), most)):
        if cut is None:
            parts.append(_pixels(decoded(part)))
        else:
            lines = decode_tiles(decoded, part, cut, latent.vae_scale_factor)
            parts.append(np.concatenate([_pixels(each) for each in lines], axis=1))
    return np.concatenate(parts)


def unscaled(latent: Latent, latents: Floats) -> Floats:
    """Latents of any shape, scaled as the autoencoder has them rather than the denoiser."""
    return latents / np.float32(latent.scaling) + np.float32(latent.shift)


def encode_pixels(engine: Callable[[str], Engine], manifest: Manifest, tiling: Tiling | None, pixels: Floats) -> Floats:
    """Encode images.

    Args:
        engine: Gives the opened engine of a component.
        manifest: The bundle's.
        tiling: How to cut large images; ``None`` encodes them whole.
        pixels: float32 ``[images, 3, height, width]``, from -1 to 1.

    Returns:
        Mean and log variance of the Gaussian of their latents, float32 ``[images, 2 * channels, h, w]``.

    Raises:
        EngineError: if the engine fails, or computes values that are not finite.
    """
    encode = functools.partial(_encoded, engine(VAE_ENCODER))
    if tiling is None or not tiling.splits(pixels.shape[3], pixels.shape[2]):
        return encode(pixels)
    return encode_tiles(encode, pixels, tiling, manifest.latent.vae_scale_factor)


def _decoded(engine: Engine, component: str, sample: Floats) -> Floats:
    return output_of(engine, component, "sample", {"latent_sample": sample})


def _encoded(engine: Engine, part: Floats) -> Floats:
    return output_of(engine, VAE_ENCODER, "latent_parameters", {"sample": part})


def _pixels(decoded: Floats) -> NDArray[np.uint8]:
    scaled = np.clip(decoded / 2 + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1) * 255
    return np.rint(scaled).astype(np.uint8, order="C")


def check_decoder(manifest: Manifest, decoder: str | None) -> str:
    """The decoder to use: the model's own unless another is named.

    Args:
        manifest: The bundle's.
        decoder: One of :data:`DECODERS`, or ``None``.

    Raises:
        InvalidRequestError: if there is no such decoder, or the bundle lacks it.
    """
    if decoder is None:
        return "full"
    check_choice("decoder", decoder, DECODERS)
    if decoder == "tiny" and TINY_DECODER not in manifest.components:
        raise InvalidRequestError(
            "decoder is 'tiny', but the bundle has no tiny decoder; build it again with --tiny-vae DIR"
        )
    return decoder
