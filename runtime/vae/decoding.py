"""From latents to pixels, and from pixels to what latents are drawn from: whole, in parts, and in tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.checks import show
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import TINY_DECODER, VAE_ENCODER, Manifest
from ..engine_calls import Floats, output_of
from .tiling import Tiling, decode_tiles, encode_tiles


def decode_latents(
    engine: Callable[[str], Engine],
    manifest: Manifest,
    latents: Floats,
    tiling: Tiling | None = None,
    decoder: str | None = None,
    most: int | None = None,
) -> NDArray[np.uint8]:
    """Latents ``[images, channels, h, w]`` to pixels ``[images, height, width, 3]``.

    Args:
        engine: Gives the opened engine of a component.
        manifest: Of the bundle.
        latents: As a loop leaves them.
        tiling: How to cut large pictures; ``None`` decodes them whole.
        decoder: ``"full"`` or ``"tiny"``; ``None`` is the full one.
        most: Most pictures to decode at a time.

    Raises:
        InvalidRequestError: if there is no such decoder.
        EngineError: if the engine fails, or computes values that are not finite.
    """
    latent, component, sample = manifest.latent, "vae_decoder", latents
    if check_decoder(manifest, decoder) == "tiny":
        component = TINY_DECODER  # takes the denoiser's latents as they are
    else:
        sample = latents / np.float32(latent.scaling) + np.float32(latent.shift)
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


def encode_pixels(engine: Callable[[str], Engine], manifest: Manifest, tiling: Tiling | None, pixels: Floats) -> Floats:
    """Pictures ``[images, 3, height, width]`` from -1 to 1, to parameters of the distribution of their latents.

    Args:
        engine: Gives the opened engine of a component.
        manifest: Of the bundle.
        tiling: How to cut large pictures; ``None`` encodes them whole.
        pixels: The pictures.

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


DECODERS = ("full", "tiny")
"""What may turn latents into pictures."""


def check_decoder(manifest: Manifest, decoder: str | None) -> str:
    """Which decoder to use, by default the model's own.

    Raises:
        InvalidRequestError: if there is no such decoder, or the bundle lacks it.
    """
    if decoder not in (None, *DECODERS):
        raise InvalidRequestError(f"decoder is {show(decoder)}, expected {' or '.join(DECODERS)}")
    if decoder == "tiny" and TINY_DECODER not in manifest.components:
        raise InvalidRequestError(
            "decoder is 'tiny', but the bundle has no tiny decoder; build it again with --tiny-vae DIR"
        )
    return decoder or "full"
