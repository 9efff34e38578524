"""Latents that a caller gives in place of a seed's noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.checks import is_integer
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import Latent


def take_latents(options: Mapping[str, Any], latent: Latent) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Take the latents out of a request's options; they decide the size, and the least number of images.

    Args:
        options: With or without ``latents``, ``[k, channels, h, w]``.
        latent: The model's latent space.

    Returns:
        The other options, with ``width``, ``height`` and ``images``, and the latents, float32
        ``[images, channels, h, w]``: repeated as a whole where more images are asked for.

    Raises:
        InvalidRequestError: if they are no latents of this model, or their size or number is not the one asked for.
    """
    rest = {name: value for name, value in options.items() if name != "latents"}
    given = options.get("latents")
    if given is None:
        if rest.get("denoising_start") is not None:
            raise InvalidRequestError(
                f"denoising_start is {rest['denoising_start']!r}, but there is nothing to go on from; "
                "give the latents of a run with that denoising_end"
            )
        return rest, None
    if rest.get("variation_strength"):
        raise InvalidRequestError("latents are given, and variation_strength, which turns a seed's noise; give one")
    try:
        latents = np.array(given, np.float32)
    except (TypeError, ValueError):
        raise InvalidRequestError(f"latents are a {type(given).__name__}, expected an array of numbers") from None
    if latents.ndim != 4 or latents.shape[1] != latent.channels or 0 in latents.shape:
        raise InvalidRequestError(
            f"latents have the shape {list(latents.shape)}, expected [images, {latent.channels}, height / "
            f"{latent.vae_scale_factor}, width / {latent.vae_scale_factor}]"
        )
    if not np.isfinite(latents).all():
        raise InvalidRequestError("latents hold NaN or infinity, expected finite numbers")
    count, _, height, width = latents.shape
    for name, length in (("height", height), ("width", width)):
        pixels = length * latent.vae_scale_factor
        if rest.get(name) not in (None, pixels):
            raise InvalidRequestError(f"{name} is {rest[name]!r}, but the latents' is {pixels}; leave it out")
        rest[name] = pixels
    images = rest.get("images")
    images = count if images is None else images
    if not is_integer(images) or images % count:
        raise InvalidRequestError(f"images is {images!r}, but {count} latents are given; ask for a multiple of that")
    rest["images"] = images
    return rest, np.tile(latents, (max(images // count, 1), 1, 1, 1))
