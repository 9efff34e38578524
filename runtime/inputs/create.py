"""From a caller's keywords to a checked request with every default filled in."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from latentrt.engines.checks import check_flag, check_integer, check_number, show
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import SAFETY_CHECKER, Manifest
from ..bundle.reader import Bundle
from ..components.engine_choice import FixedSize
from ..families import family_of, refuse_foreign
from ..images.reading import PictureRecord
from ..request.control import Control
from ..request.options import (
    LONGEST_SEQUENCE,
    MAX_PIXELS,
    MAX_SIDE,
    OUTPUTS,
    RESIZES,
    SAFETY,
    RequestOptions,
    SpecialOptions,
)
from ..request.request import Request
from ..samplers import SAMPLERS
from ..samplers.cut import check_part
from ..text.chunks import check_syntax
from ..vae.decoding import check_decoder
from ..vae.tiling import Tiling
from .starting_image import task_values

_MOST_STEPS = 10_000


_LARGEST_ORIGINAL = 65_536  # pixels


_OF_HALVES: Mapping[str, object] = {
    "negative_prompt": "",
    "negative_prompt_2": "",
    "negative_original_size": None,
    "negative_crop": None,
    "negative_target_size": None,
    "negative_aesthetic_score": None,
    "negative_prompt_3": "",
    "guidance_start": 0.0,
    "guidance_end": 1.0,
    "guidance_rescale": 0.0,
}


_UNUSED: Mapping[str, object] = {"clip_skip": 0, "prompt_syntax": "plain"}  # no text is used for none at all, elsewhere


def check_safety(manifest: Manifest, safety: str | None) -> str:
    """What to do about unsafe pictures, by default nothing.

    Raises:
        InvalidRequestError: if that is unknown, or the bundle has nothing that finds them.
    """
    if safety not in (None, *SAFETY):
        raise InvalidRequestError(f"safety is {show(safety)}, expected one of {', '.join(SAFETY)}")
    if safety not in (None, "off") and SAFETY_CHECKER not in manifest.components:
        raise InvalidRequestError(
            f"safety is {safety!r}, but the bundle has no safety checker; build it again with --safety-checker DIR"
        )
    return safety or "off"


def _check_guidance(request: Request, kind: str) -> None:
    """Refuse what needs two predictions where a model gives one, and a scale where it knows none."""
    if kind == "none" and request.guidance > 1:
        raise InvalidRequestError(
            f"guidance is {request.guidance:g}, but this model was made to run without; leave it out or set it to 1"
        )
    given = [name for name, usual in _OF_HALVES.items() if getattr(request, name) not in (usual, None)]
    if given and not request.classifier_free:
        raise InvalidRequestError(
            f"{given[0]} is for guidance from two predictions, which this model does not have; leave it out"
        )


def _levels(name: str, values: Any) -> tuple[float, ...] | None:
    """Timesteps or sigmas as they are given; their order and range are the sampler's to check."""
    if values is None:
        return None
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        raise InvalidRequestError(f"{name} is {show(values)}, expected a sequence of numbers")
    if not 1 <= len(values) <= _MOST_STEPS:
        raise InvalidRequestError(f"{name} has {len(values)} entries, expected 1 to {_MOST_STEPS}")
    try:
        levels = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequestError(f"{name} is {show(values)}, expected a sequence of numbers") from None
    if not all(map(math.isfinite, levels)):
        raise InvalidRequestError(f"{name} is {show(values)}, expected finite numbers")
    return levels


def _tiling(value: Any, factor: int) -> Tiling | None:
    if value is None or value is False:
        return None
    if not isinstance(value, Tiling):
        value = Tiling() if value is True else Tiling(value)
    fitted: Tiling = value.fitted(factor)
    return fitted


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"{name} is a {type(value).__name__}, expected a string")
    return value


def _pair(name: str, value: Any, least: int) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)) or len(value) != 2:
        raise InvalidRequestError(f"{name} is {show(value)}, expected two whole numbers, across and down")
    across, down = (check_integer(name, each, least, _LARGEST_ORIGINAL) for each in value)
    return across, down


def _score(name: str, value: Any) -> float | None:
    return None if value is None else check_number(name, value, 0, 10)


def _length(name: str, value: Any) -> int | None:
    return None if value is None else check_integer(name, value, 1, LONGEST_SEQUENCE)


_size, _place = functools.partial(_pair, least=1), functools.partial(_pair, least=0)


FAMILY_OPTIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "prompt_2": _text,
    "negative_prompt_2": _text,
    "original_size": _size,
    "crop": _place,
    "target_size": _size,
    "negative_original_size": _size,
    "negative_crop": _place,
    "negative_target_size": _size,
    "aesthetic_score": _score,
    "negative_aesthetic_score": _score,
    "prompt_3": _text,
    "negative_prompt_3": _text,
    "max_sequence_length": _length,
    "prompt_syntax": check_syntax,
}
"""The options of :class:`FamilyOptions`, and what checks the value of each."""


def _record(name: str, value: Any) -> PictureRecord | None:
    if value is not None and not isinstance(value, PictureRecord):
        raise InvalidRequestError(f"{name} is a {type(value).__name__}, expected the record of a picture that was read")
    return value


def _strength(name: str, value: Any) -> float | None:
    if value is not None and check_number(name, value, 0, 1) == 0:
        raise InvalidRequestError(f"{name} is {show(value)}, expected more than 0, which changes nothing, and up to 1")
    return None if value is None else float(value)


def _optional_flag(name: str, value: Any) -> bool | None:
    return None if value is None else check_flag(name, value)


def _resize(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in RESIZES:
        raise InvalidRequestError(f"{name} is {show(value)}, expected {' or '.join(RESIZES)}")
    return value


TASK_OPTIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "image": _record,
    "mask": _record,
    "strength": _strength,
    "resize": _resize,
    "mask_blur": lambda name, value: None if value is None else check_number(name, value, 0, 1024),
    "mask_padding": lambda name, value: None if value is None else check_integer(name, value, 0, MAX_SIDE),
    "keep_outside": _optional_flag,
    "variation_seed": lambda name, value: None if value is None else check_integer(name, value, 0, 2**64 - 1),
    "variation_strength": lambda name, value: None if value is None else check_number(name, value, 0, 1),
}
"""The options of :class:`TaskOptions`, likewise."""


def _side(name: str, value: Any, unit: int) -> int:
    pixels = check_integer(name, value, unit, MAX_SIDE)
    if pixels % unit:
        below = pixels // unit * unit
        raise InvalidRequestError(
            f"{name} is {pixels}, expected a multiple of {unit}; the nearest are {below} and {below + unit}"
        )
    return pixels


def create_request(
    manifest: Manifest,
    prompt: str,
    *,
    negative_prompt: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    sampler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    images: int = 1,
    clip_skip: int | None = None,
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
    guidance_rescale: float = 0.0,
    eta: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    output: str | None = None,
    decoder: str | None = None,
    vae_tiling: Tiling | int | bool | None = None,
    control: Sequence[Control] | None = None,
    guess_mode: bool = False,
    ip_adapter_image: PictureRecord | None = None,
    ip_adapter_scale: float | None = None,
    safety: str | None = None,
    **special: Unpack[SpecialOptions],
) -> Request:
    """Fill in a bundle's defaults and check everything.

    ``seed=None`` draws a seed, which the request then carries. Custom timesteps or sigmas decide ``steps``. Without
    ``output`` there are pictures, or latents alone where ``denoising_end`` leaves noise in them.
    ``vae_tiling=True`` is a :class:`~latentrt.runtime.tiling.Tiling` as it comes, a number one with tiles of that
    size, and ``False`` none.

    Raises:
        InvalidRequestError: naming the first value that is wrong, what was received and what is expected, or the
            first option that the bundle's family does not have.
        BundleError: if the family is unknown.
    """
    if unknown := special.keys() - FAMILY_OPTIONS.keys() - TASK_OPTIONS.keys():
        special_last = {*FAMILY_OPTIONS, *TASK_OPTIONS}.__contains__
        known = ", ".join(sorted(RequestOptions.__annotations__, key=special_last))
        raise InvalidRequestError(f"unknown option {min(unknown)!r}; known options: {known}")
    defaults, family = manifest.defaults, family_of(manifest)
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str):
            raise InvalidRequestError(f"{name} is a {type(text).__name__}, expected a string")
    own = {"timesteps": _levels("timesteps", timesteps), "sigmas": _levels("sigmas", sigmas)}
    count = next((len(levels) for levels in own.values() if levels is not None), defaults.steps)
    if steps is not None and steps != count and any(levels is not None for levels in own.values()):
        raise InvalidRequestError(f"steps is {show(steps)}, but {count} of one's own are given; leave steps out")
    start, end = check_part(denoising_start, denoising_end)
    if output not in (None, *OUTPUTS):
        raise InvalidRequestError(f"output is {show(output)}, expected {' or '.join(OUTPUTS)}")
    request = Request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        steps=check_integer("steps", count if steps is None else steps, 1, _MOST_STEPS),
        guidance=check_number(
            "guidance", defaults.guidance if guidance is None else guidance, 0, 1000, hint=" (7.5 is usual, 1 is none)"
        ),
        seed=check_integer("seed", secrets.randbits(32) if seed is None else seed, 0, 2**64 - 1),
        sampler=defaults.sampler if sampler is None else sampler,
        width=_side("width", defaults.width if width is None else width, family.size_multiple),
        height=_side("height", defaults.height if height is None else height, family.size_multiple),
        images=check_integer("images", images, 1, 4096),
        clip_skip=check_integer("clip_skip", defaults.clip_skip if clip_skip is None else clip_skip, 0, 1),
        guidance_start=check_number("guidance_start", guidance_start, 0, 1),
        guidance_end=check_number("guidance_end", guidance_end, 0, 1),
        guidance_rescale=check_number("guidance_rescale", guidance_rescale, 0, 1),
        eta=None if eta is None else check_number("eta", eta, 0, 1),
        classifier_free=family.guidance == "classifier-free",
        timesteps=own["timesteps"],
        sigmas=own["sigmas"],
        denoising_start=start,
        denoising_end=end,
        output=output or ("image" if end is None else "latent"),
        decoder=check_decoder(manifest, decoder),
        vae_tiling=_tiling(vae_tiling, manifest.latent.vae_scale_factor),
        control=tuple(control or ()),
        guess_mode=check_flag("guess_mode", guess_mode),
        ip_adapter_image=ip_adapter_image,
        ip_adapter_scale=None
        if ip_adapter_image is None
        else check_number("ip_adapter_scale", 1.0 if ip_adapter_scale is None else ip_adapter_scale, 0, 10),
        safety=check_safety(manifest, safety),
        **{name: check(name, special.get(name)) for name, check in FAMILY_OPTIONS.items()},
        **task_values({name: check(name, special.get(name)) for name, check in TASK_OPTIONS.items()}, family),
    )
    if request.sampler not in SAMPLERS:
        raise InvalidRequestError(f"unknown sampler {show(request.sampler)}; known samplers: {', '.join(SAMPLERS)}")
    if request.guess_mode and not request.control:
        raise InvalidRequestError("guess_mode is for ControlNets, and none is asked for; leave it out")
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
            f"{request.images} pictures of {request.width}x{request.height} have {pixels:,} pixels, "
            f"at most {MAX_PIXELS:,} fit one request; ask for fewer or smaller ones"
        )
    values = {name: getattr(request, name) for name in ("negative_prompt", "clip_skip", *FAMILY_OPTIONS)}
    given = [name for name, value in values.items() if value is not None and value != _UNUSED.get(name, "")]
    refuse_foreign(family, given)
    _check_guidance(request, family.guidance)
    family.check(request)
    return request


def fixed_size_of(bundle: Bundle, width: int | None, height: int | None, images: int | None) -> FixedSize:
    """The size that was asked for, with the bundle's own where nothing was, checked as a request's is."""
    request = create_request(bundle.manifest, "", width=width, height=height, images=1 if images is None else images)
    return FixedSize(request.width, request.height, request.images)
