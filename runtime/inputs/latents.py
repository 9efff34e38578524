"""Latents that a caller gives in place of a seed's noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.checks import is_integer
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import Manifest
from ..families import family_of


def take_latents(options: Mapping[str, Any], manifest: Manifest) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Separate latents from the other options of a request; they decide its size, and its number of images at least.

    Args:
        options: With or without ``latents``, ``[k, ...]``, such as ``[k, channels, h, w]``.
        manifest: The bundle's.

    Returns:
        The other options, with those that the latents decide, such as ``width`` and ``height``, and ``images``; and the
        latents, float32 ``[images, ...]``: repeated as a whole where more images are asked for than there are.

    Raises:
        InvalidRequestError: if they are no latents of this model, or not of the size and number that is asked for.
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
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequestError(f"latents are a {type(given).__name__}, expected an array of numbers") from None
    decided = family_of(manifest).options_of_latents(latents.shape)
    if 0 in latents.shape:
        raise InvalidRequestError(f"latents have the shape {list(latents.shape)}, expected no length of 0")
    if not np.isfinite(latents).all():
        raise InvalidRequestError("latents hold NaN or infinity, expected finite numbers")
    count = len(latents)
    for name, value in decided.items():
        if rest.get(name) not in (None, value):
            raise InvalidRequestError(f"{name} is {rest[name]!r}, but the latents' is {value}; leave it out")
        rest[name] = value
    images = rest.get("images")
    images = count if images is None else images
    if not is_integer(images) or images % count:
        raise InvalidRequestError(f"images is {images!r}, but {count} latents are given; ask for a multiple of that")
    rest["images"] = images
    return rest, np.tile(latents, (max(images // count, 1), *[1] * (latents.ndim - 1)))
