"""From a caller's keywords to a checked request with every default filled in."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Unpack

from latentrt.engines.checks import show
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import Manifest
from ..bundle.reader import Bundle
from ..components.engine_choice import FixedSize
from ..families import Family, family_of, refuse_foreign
from ..request.kinds import Limits, check_text
from ..request.options import FAMILY_OPTIONS, MAX_PIXELS, OPTIONS, RequestOptions, require_known, require_needed
from ..request.request import Request
from ..samplers.cut import check_part
from .starting_image import fill_in_image_options


def create_request(manifest: Manifest, prompt: str, **options: Unpack[RequestOptions]) -> Request:
    """Fill in a bundle's defaults and check everything.

    ``seed=None`` draws a seed, which the request then carries. Custom timesteps or sigmas decide ``steps``. Without
    ``output`` the request ends in images, or in latents alone where ``denoising_end`` leaves noise in them.

    Args:
        manifest: The bundle's.
        prompt: Text to draw.
        options: See :data:`latentrt.runtime.request.options.OPTIONS`.

    Raises:
        InvalidRequestError: naming the first value that is wrong, what was received and what is expected, or the
            first option that the bundle's family does not have.
        BundleError: if the family is unknown.
    """
    require_known(options)
    check_text("prompt", prompt)
    family = family_of(manifest)
    limits = Limits(manifest, family.size_multiple)
    given: dict[str, Any] = {**options}
    if (count := _own_levels(given, limits)) is not None:
        given["steps"] = count
    values = {name: option.value(given, limits) for name, option in OPTIONS.items()}
    require_needed(values)
    values = _filled_in(values, family)
    request = Request(prompt=prompt, classifier_free=family.guidance == "classifier-free", **values)
    _check_together(request)
    refuse_foreign(family, [name for name in FAMILY_OPTIONS if OPTIONS[name].used(getattr(request, name))])
    _check_guidance(request, family.guidance)
    family.check(request)
    return request


def fixed_size_of(bundle: Bundle, width: int | None, height: int | None, images: int | None) -> FixedSize:
    """A size that engines are opened for, checked as a request's is.

    Args:
        bundle: The bundle.
        width: In pixels; ``None`` is the bundle's default.
        height: In pixels; ``None`` is the bundle's default.
        images: Images at a time; ``None`` is one.

    Raises:
        InvalidRequestError: if no request can have this size.
    """
    request = create_request(bundle.manifest, "", width=width, height=height, images=1 if images is None else images)
    return FixedSize(request.width, request.height, request.images)


def _own_levels(options: Mapping[str, Any], limits: Limits) -> int | None:
    """How many timesteps or sigmas a caller gives; ``None`` if the sampler chooses them.

    Raises:
        InvalidRequestError: if ``steps`` says another number.
    """
    levels = [OPTIONS[name].value(options, limits) for name in ("timesteps", "sigmas")]
    count = next((len(each) for each in levels if each is not None), None)
    steps = options.get("steps")
    if count is not None and steps is not None and steps != count:
        raise InvalidRequestError(f"steps is {show(steps)}, but {count} of one's own are given; leave steps out")
    return count


def _filled_in(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Checked values, with the defaults that depend on other options or on the family."""
    found = fill_in_image_options(values, family)
    check_part(found["denoising_start"], found["denoising_end"])
    if found["seed"] is None:
        found["seed"] = secrets.randbits(32)
    if found["output"] is None:
        found["output"] = "image" if found["denoising_end"] is None else "latent"
    if found["ip_adapter_image"] is not None and found["ip_adapter_scale"] is None:
        found["ip_adapter_scale"] = 1.0
    return found


def _check_together(request: Request) -> None:
    """Refuse values that are each in range, and do not go together."""
    if request.safety != "off" and request.output == "latent":
        raise InvalidRequestError(
            f"safety is {request.safety!r}, but the request ends in latents, which cannot be looked at; leave it out"
        )
    if request.guidance_start >= request.guidance_end:
        raise InvalidRequestError(
            f"guidance_start is {request.guidance_start:g}, expected less than guidance_end, "
            f"which is {request.guidance_end:g}; for no guidance at all, set guidance to 1"
        )
    if (pixels := request.images * request.width * request.height) > MAX_PIXELS:
        raise InvalidRequestError(
            f"{request.images} images of {request.width}x{request.height} have {pixels:,} pixels, "
            f"at most {MAX_PIXELS:,} fit one request; ask for fewer or smaller ones"
        )


def _check_guidance(request: Request, kind: str) -> None:
    """Refuse what needs two predictions where a model gives one, and a scale where it knows none."""
    if kind == "none" and request.guidance > 1:
        raise InvalidRequestError(
            f"guidance is {request.guidance:g}, but this model was made to run without; leave it out or set it to 1"
        )
    halves = [name for name, option in OPTIONS.items() if option.two_predictions]
    given = [name for name in halves if OPTIONS[name].used(getattr(request, name))]
    if given and not request.classifier_free:
        raise InvalidRequestError(
            f"{given[0]} is for guidance from two predictions, which this model does not have; leave it out"
        )
