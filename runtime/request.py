"""One request, checked before anything is computed."""

from __future__ import annotations

import functools
import math
import numbers
import reprlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np

from latentrt.engines.errors import InvalidRequestError

from .control import Control
from .embeddings import RecordedFile
from .families import family_of, refuse_foreign
from .lora import AppliedLora
from .manifest import SAFETY_CHECKER, TINY_DECODER, Manifest
from .pictures import Picture, PictureRecord
from .prompts import check_syntax
from .samplers import SAMPLERS, Plan, compile_plan
from .samplers.cut import check_part
from .tasks import RESIZES, task_values
from .tiling import Tiling

MAX_SIDE = 16384
"""Largest width or height in pixels."""
MAX_PIXELS = 2**28
"""Most pixels that the pictures of one request may have together (3 GiB as fp32)."""

OUTPUTS = ("image", "latent")
"""What a request may be answered with."""

DECODERS = ("full", "tiny")
"""What may turn latents into pictures."""

SAFETY = ("off", "mark", "black")
"""What may become of unsafe pictures: they are not looked for, or flagged, or flagged and made black."""

LONGEST_SEQUENCE = 512
"""Most tokens of a T5 text encoder, as in diffusers."""

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
_SHORT = reprlib.Repr()
_SHORT.maxstring = 120


class FamilyOptions(TypedDict, total=False):
    """Keywords of a request for models of some families alone: fields of :class:`Request`; ``None`` is not given."""

    prompt_2: str | None
    negative_prompt_2: str | None
    original_size: tuple[int, int] | None
    crop: tuple[int, int] | None
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crop: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None
    prompt_3: str | None
    negative_prompt_3: str | None
    max_sequence_length: int | None
    prompt_syntax: str | None


class TaskOptions(TypedDict, total=False):
    """Keywords of a request that draws from a picture, or varies one; see :mod:`.tasks`.

    ``image`` and ``mask`` are pictures where a pipeline is called, and records of them in :class:`Request`.
    """

    image: Picture | PictureRecord | None
    mask: Picture | PictureRecord | None
    strength: float | None
    resize: str | None
    mask_blur: float | None
    mask_padding: int | None
    keep_outside: bool | None
    variation_seed: int | None
    variation_strength: float | None


class _SpecialOptions(FamilyOptions, TaskOptions, total=False):
    pass


class RequestOptions(_SpecialOptions, total=False):
    """Keywords of a request besides the prompt: fields of :class:`Request`; ``None`` is the bundle's default."""

    negative_prompt: str
    steps: int | None
    guidance: float | None
    seed: int | None
    sampler: str | None
    width: int | None
    height: int | None
    images: int
    clip_skip: int | None
    guidance_start: float
    guidance_end: float
    guidance_rescale: float
    eta: float | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    denoising_start: float | None
    denoising_end: float | None
    output: str | None
    decoder: str | None
    vae_tiling: Tiling | int | bool | None
    control: Sequence[Control] | None
    guess_mode: bool
    ip_adapter_image: PictureRecord | None
    ip_adapter_scale: float | None
    safety: str | None


@dataclass(frozen=True)
class Request:
    """A text-to-image request with every default filled in.

    Attributes:
        prompt: What to draw; what exceeds the tokenizer's length is cut off.
        negative_prompt: What to steer away from.
        steps: Sampler steps. (A sampler of second order calls the model twice in a step.)
        guidance: Scale of classifier-free guidance; at 1 or below the negative prompt is not computed at all.
        seed: Seed of the noise, 0 to 2**64 - 1: the same as ``torch.Generator("cpu").manual_seed(seed)``.
        sampler: One of :data:`latentrt.runtime.samplers.SAMPLERS`.
        width: Width in pixels.
        height: Height in pixels.
        images: Pictures to draw, all from one noise stream.
        clip_skip: Layers of the text encoder to leave out: 0 or 1.
        guidance_start: Fraction of the run from which on there is guidance; before it the negative prompt is not
            computed (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        guidance_end: Fraction of the run from which on there is none any more.
        guidance_rescale: Share, 0 to 1, of a prediction whose contrast is brought back to that of the conditional one
            (Lin et al. 2023, arXiv 2305.08891, section 3.4).
        eta: Amount of fresh noise, 0 to 1, for the samplers that have the choice; ``None`` is the sampler's own.
        timesteps: Timesteps to visit, descending, in place of those that the sampler would choose.
        sigmas: Noise levels to visit, descending, in the form that the sampler's diffusers class takes.
        prompt_2: Prompt of the second text encoder; ``None`` or nothing is ``prompt``.
        negative_prompt_2: Likewise what to steer away from.
        original_size: Width and height in pixels of the picture that the model is to think this one was made from; a
            small one gives a blurry picture. ``None`` is the picture's own, as for the next two.
        crop: Left and top of the cut-out that it is to think the picture is; ``None`` is the corner.
        target_size: Width and height that it is to think the picture has.
        negative_original_size: What it is to be steered away from, likewise; ``None`` is as for the prompt.
        negative_crop: Likewise; ``None`` is the corner.
        negative_target_size: Likewise.
        aesthetic_score: Score, 0 to 10, that the model is to think the picture has; ``None`` is 6.
        negative_aesthetic_score: What it is to be steered away from, likewise; ``None`` is 2.5.
        denoising_start: Fraction of the trained timesteps, counted from pure noise, at which the request goes on from
            latents that are given; ``None`` is the start.
        denoising_end: Fraction at which it ends, with noise left for another model to take away; ``None`` is the end.
        output: One of :data:`OUTPUTS`: pictures, or latents alone.
        decoder: One of :data:`DECODERS`: the model's own, or a tiny one, where the bundle has one.
        prompt_3: Prompt of the third text encoder; ``None`` or nothing is ``prompt``.
        negative_prompt_3: Likewise what to steer away from.
        max_sequence_length: Tokens of a T5 text encoder, padding included; ``None`` is the family's number.
        prompt_syntax: How prompts are read, one of :data:`latentrt.runtime.prompts.SYNTAXES`.
        vae_tiling: How pictures are cut into tiles to be decoded; ``None`` decodes them whole.
        image: The picture that it begins with.
        mask: The picture that says what of it is painted anew: where it is white.
        strength: How much of the picture is changed, above 0 and up to 1: the share of the steps that are taken.
        resize: One of :data:`latentrt.runtime.tasks.RESIZES`.
        mask_blur: Radius in pixels by which the mask is blurred.
        mask_padding: Pixels around the mask: that part of the picture alone is drawn, at the size of the request, and
            put back into its place. ``None`` draws all of it.
        keep_outside: Whether the result is put into the picture through the mask, so that what is outside of it is the
            picture's, bit for bit.
        variation_seed: Seed of the noise that the seed's own is turned towards.
        variation_strength: How far, 0 to 1.
        control: ControlNets that steer, with records of their pictures.
        guess_mode: Whether they act on the prompt's half of guidance alone, and less on finer levels (Zhang et al.
            2023, arXiv 2302.05543, section 3.4 as of its first version).
        ip_adapter_image: What is kept of a picture that is part of the prompt.
        ip_adapter_scale: How much of it, 0 to 10; 1 unless given.
        safety: What becomes of unsafe pictures: ``"off"`` does not look for them, ``"mark"`` flags them, ``"black"``
            flags them and makes them black.
        classifier_free: Whether guidance comes from a second prediction, for the negative prompt. If not, the model
            takes its scale in, or knows none.
        embeddings: Words of the pipeline with vectors from files.
        loras: LoRAs that were on while it was drawn, in their order; a pipeline fills this in.
    """

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    sampler: str
    width: int
    height: int
    images: int
    clip_skip: int
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_rescale: float = 0.0
    eta: float | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    output: str = "image"
    decoder: str = "full"
    prompt_3: str | None = None
    negative_prompt_3: str | None = None
    max_sequence_length: int | None = None
    prompt_syntax: str = "plain"
    vae_tiling: Tiling | None = None
    image: PictureRecord | None = None
    mask: PictureRecord | None = None
    strength: float | None = None
    resize: str | None = None
    mask_blur: float | None = None
    mask_padding: int | None = None
    keep_outside: bool | None = None
    variation_seed: int | None = None
    variation_strength: float | None = None
    control: tuple[Control, ...] = ()
    guess_mode: bool = False
    ip_adapter_image: PictureRecord | None = None
    ip_adapter_scale: float | None = None
    safety: str = "off"
    classifier_free: bool = True
    embeddings: tuple[RecordedFile, ...] = ()
    loras: tuple[AppliedLora, ...] = ()

    def compile_plan(
        self,
        scheduler: Mapping[str, Any],
        *,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        left_out: int = 0,
        strength: float | None = None,
    ) -> Plan:
        """The sampler's plan for this request.

        Args:
            scheduler: The bundle's ``scheduler_config.json``.
            sigmas: Noise levels to visit if the request names neither levels nor timesteps.
            mu: Dynamic shift of a flow schedule.
            left_out: Steps to leave out at the start.
            strength: Share of the timesteps among which a distilled model's sampler chooses.

        Raises:
            InvalidRequestError: if the sampler cannot do what is asked.
        """
        levels = sigmas if self.timesteps is None and self.sigmas is None else self.sigmas
        steps = self.steps if self.timesteps is None and levels is None else None
        return compile_plan(
            self.sampler,
            scheduler,
            steps,
            timesteps=self.timesteps,
            sigmas=levels,
            eta=self.eta,
            mu=mu,
            denoising_start=self.denoising_start,
            denoising_end=self.denoising_end,
            left_out=left_out,
            strength=strength,
        )

    @property
    def guided(self) -> bool:
        """Whether the unconditional half is computed at all."""
        return self.classifier_free and self.guidance > 1

    def guided_at(self, index: int, total: int) -> bool:
        """Whether the unconditional half is computed in call ``index`` of ``total`` of the denoiser."""
        return self.guided and self.guidance_start * total <= index < self.guidance_end * total

    @classmethod
    def create(
        cls,
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
        **special: Unpack[_SpecialOptions],
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
            raise InvalidRequestError(f"steps is {_show(steps)}, but {count} of one's own are given; leave steps out")
        start, end = check_part(denoising_start, denoising_end)
        if output not in (None, *OUTPUTS):
            raise InvalidRequestError(f"output is {_show(output)}, expected {' or '.join(OUTPUTS)}")
        request = cls(
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=_integer("steps", count if steps is None else steps, 1, _MOST_STEPS),
            guidance=_number(
                "guidance", defaults.guidance if guidance is None else guidance, 1000, " (7.5 is usual, 1 is none)"
            ),
            seed=_integer("seed", secrets.randbits(32) if seed is None else seed, 0, 2**64 - 1),
            sampler=defaults.sampler if sampler is None else sampler,
            width=_side("width", defaults.width if width is None else width, family.unit),
            height=_side("height", defaults.height if height is None else height, family.unit),
            images=_integer("images", images, 1, 4096),
            clip_skip=_integer("clip_skip", defaults.clip_skip if clip_skip is None else clip_skip, 0, 1),
            guidance_start=_number("guidance_start", guidance_start, 1),
            guidance_end=_number("guidance_end", guidance_end, 1),
            guidance_rescale=_number("guidance_rescale", guidance_rescale, 1),
            eta=None if eta is None else _number("eta", eta, 1),
            classifier_free=family.guidance == "classifier-free",
            timesteps=own["timesteps"],
            sigmas=own["sigmas"],
            denoising_start=start,
            denoising_end=end,
            output=output or ("image" if end is None else "latent"),
            decoder=check_decoder(manifest, decoder),
            vae_tiling=_tiling(vae_tiling, manifest.latent.factor),
            control=tuple(control or ()),
            guess_mode=_flag("guess_mode", guess_mode),
            ip_adapter_image=ip_adapter_image,
            ip_adapter_scale=None
            if ip_adapter_image is None
            else _number("ip_adapter_scale", 1.0 if ip_adapter_scale is None else ip_adapter_scale, 10),
            safety=check_safety(manifest, safety),
            **{name: check(name, special.get(name)) for name, check in FAMILY_OPTIONS.items()},
            **task_values({name: check(name, special.get(name)) for name, check in TASK_OPTIONS.items()}, family),
        )
        if request.sampler not in SAMPLERS:
            raise InvalidRequestError(
                f"unknown sampler {_show(request.sampler)}; known samplers: {', '.join(SAMPLERS)}"
            )
        if request.guess_mode and not request.control:
            raise InvalidRequestError("guess_mode is for ControlNets, and none is asked for; leave it out")
        if request.safety != "off" and request.output == "latent":
            raise InvalidRequestError(
                f"safety is {request.safety!r}, but the request ends in latents, which cannot be looked at; "
                "leave it out"
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


def check_decoder(manifest: Manifest, decoder: str | None) -> str:
    """Which decoder to use, by default the model's own.

    Raises:
        InvalidRequestError: if there is no such decoder, or the bundle lacks it.
    """
    if decoder not in (None, *DECODERS):
        raise InvalidRequestError(f"decoder is {_show(decoder)}, expected {' or '.join(DECODERS)}")
    if decoder == "tiny" and TINY_DECODER not in manifest.components:
        raise InvalidRequestError(
            "decoder is 'tiny', but the bundle has no tiny decoder; build it again with --tiny-vae DIR"
        )
    return decoder or "full"


def check_safety(manifest: Manifest, safety: str | None) -> str:
    """What to do about unsafe pictures, by default nothing.

    Raises:
        InvalidRequestError: if that is unknown, or the bundle has nothing that finds them.
    """
    if safety not in (None, *SAFETY):
        raise InvalidRequestError(f"safety is {_show(safety)}, expected one of {', '.join(SAFETY)}")
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


def _show(value: object) -> str:
    """What was received, in short; Python itself refuses to print an integer of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return _SHORT.repr(value)


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidRequestError(f"{name} is {_show(value)}, expected a whole number")
    number = int(value)
    if not least <= number <= most:
        raise InvalidRequestError(f"{name} is {_show(number)}, expected {least} to {most}")
    return number


def _number(name: str, value: Any, most: int, hint: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidRequestError(f"{name} is {_show(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 <= number <= most:  # NaN compares false
        raise InvalidRequestError(f"{name} is {_show(value)}, expected 0 to {most}{hint}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InvalidRequestError(f"{name} is {_show(value)}, expected true or false")
    return bool(value)


def _levels(name: str, values: Any) -> tuple[float, ...] | None:
    """Timesteps or sigmas as they are given; their order and range are the sampler's to check."""
    if values is None:
        return None
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        raise InvalidRequestError(f"{name} is {_show(values)}, expected a sequence of numbers")
    if not 1 <= len(values) <= _MOST_STEPS:
        raise InvalidRequestError(f"{name} has {len(values)} entries, expected 1 to {_MOST_STEPS}")
    try:
        levels = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequestError(f"{name} is {_show(values)}, expected a sequence of numbers") from None
    if not all(map(math.isfinite, levels)):
        raise InvalidRequestError(f"{name} is {_show(values)}, expected finite numbers")
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
        raise InvalidRequestError(f"{name} is {_show(value)}, expected two whole numbers, across and down")
    across, down = (_integer(name, each, least, _LARGEST_ORIGINAL) for each in value)
    return across, down


def _score(name: str, value: Any) -> float | None:
    return None if value is None else _number(name, value, 10)


def _length(name: str, value: Any) -> int | None:
    return None if value is None else _integer(name, value, 1, LONGEST_SEQUENCE)


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
    if value is not None and _number(name, value, 1) == 0:
        raise InvalidRequestError(f"{name} is {_show(value)}, expected more than 0, which changes nothing, and up to 1")
    return None if value is None else float(value)


def _optional_flag(name: str, value: Any) -> bool | None:
    return None if value is None else _flag(name, value)


def _resize(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in RESIZES:
        raise InvalidRequestError(f"{name} is {_show(value)}, expected {' or '.join(RESIZES)}")
    return value


TASK_OPTIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "image": _record,
    "mask": _record,
    "strength": _strength,
    "resize": _resize,
    "mask_blur": lambda name, value: None if value is None else _number(name, value, 1024),
    "mask_padding": lambda name, value: None if value is None else _integer(name, value, 0, MAX_SIDE),
    "keep_outside": _optional_flag,
    "variation_seed": lambda name, value: None if value is None else _integer(name, value, 0, 2**64 - 1),
    "variation_strength": lambda name, value: None if value is None else _number(name, value, 1),
}
"""The options of :class:`TaskOptions`, likewise."""


def _side(name: str, value: Any, unit: int) -> int:
    pixels = _integer(name, value, unit, MAX_SIDE)
    if pixels % unit:
        below = pixels // unit * unit
        raise InvalidRequestError(
            f"{name} is {pixels}, expected a multiple of {unit}; the nearest are {below} and {below + unit}"
        )
    return pixels
