"""One image by two models: the base takes it to a point of the run, and its refiner goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import Manifest
from ..families import family_of
from ..request.options import FAMILY_OPTIONS
from .create import create_request

STEERING = ("control", "guess_mode", "ip_adapter_image", "ip_adapter_scale")
"""Options that steer the base alone: a refiner takes no ControlNets and no IP-Adapter."""

HAND_OVER = 0.8
"""Default fraction of the run at which a refiner goes on: it was trained on the last fifth of the noise levels."""


def hand_over_options(
    base: Manifest, refiner: Manifest, prompt: str, options: Mapping[str, Any], hand_over: float = HAND_OVER
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make options of the two requests that draw one image, both checked before anything is computed.

    Both have the same sampler and steps. The refiner's default guidance is its own. Its sampler draws noise from the
    next seed, since the seed's own is the noise that the image began with. Options that only one of the two families
    has are that family's; ControlNets and an IP-Adapter steer the base alone, and ``safety`` is the refiner's, which
    draws.

    Args:
        base: Manifest of the base model.
        refiner: Manifest of the refiner.
        prompt: Text to draw.
        options: The request's, as for :meth:`latentrt.runtime.Pipeline.__call__`.
        hand_over: Fraction of the trained timesteps that are the base's, above 0 and below 1.

    Returns:
        Options for the base, and for the refiner, which also takes the ``latents`` of the base's result.

    Raises:
        InvalidRequestError: if either model cannot do what is asked, or the refiner cannot go on from the base.
    """
    if base.latent != refiner.latent:
        raise InvalidRequestError(
            f"the latents of {base.source.name} and of {refiner.source.name} differ in number or scale; "
            "give a refiner that was made for this model"
        )
    if options.get("image") is not None:
        raise InvalidRequestError("image is for one model at a time; draw with the base first, then with the refiner")
    families = family_of(base), family_of(refiner)
    own, other = (
        {k: v for k, v in options.items() if k not in FAMILY_OPTIONS or k in family.options} for family in families
    )
    other = {name: value for name, value in other.items() if name not in STEERING}
    neither = families[0].options | families[1].options
    unknown = {k: v for k, v in options.items() if v is not None and k in FAMILY_OPTIONS and k not in neither}
    own |= {**unknown, "denoising_end": hand_over, "output": "latent", "decoder": None, "safety": None}
    first = create_request(base, prompt, **own)
    first.compile_plan(base.scheduler)
    usual = {"sampler": first.sampler, "width": first.width, "height": first.height, "images": first.images}
    if first.timesteps is None and first.sigmas is None:
        usual["steps"] = first.steps
    other |= {**usual, "seed": (first.seed + 1) % 2**64, "denoising_start": hand_over}
    create_request(refiner, prompt, **other).compile_plan(refiner.scheduler)
    return {**own, "seed": first.seed}, other
