"""The options of a request, each declared once: type, kind and bounds, default, who has it, and what it does.

An option is an entry of :class:`RequestOptions`. From it follow what a call accepts, how a request is checked and
filled in (:mod:`latentrt.runtime.inputs.create`), the arguments of ``latentrt generate``, the schema of request files,
the text of PNG files, and the manual's table. A new option is an entry here, a field of
:class:`~latentrt.runtime.request.request.Request`, and the code that uses it.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

from latentrt.engines.errors import InvalidRequestError

from ..images.reading import Picture, PictureRecord
from ..samplers import SAMPLERS
from ..text.chunks import SYNTAXES
from ..vae.decoding import DECODERS
from ..vae.tiling import Tiling
from .control import Control
from .declaration import Option as Option
from .kinds import (
    Choice,
    Controls,
    Decoder,
    Flag,
    Fraction,
    InputImage,
    Levels,
    Number,
    Pair,
    Safety,
    Side,
    Text,
    Tiles,
    Whole,
)

MAX_SIDE = 16384
"""Largest width or height in pixels."""

MAX_STEPS = 10_000
"""Most steps of a run, and most timesteps or sigmas of a request."""

MAX_PIXELS = 2**28
"""Most pixels that the images of one request may have together (3 GiB as fp32)."""

OUTPUTS = ("image", "latent")
"""The outputs that a request may end in."""

SAFETY = ("off", "mark", "black")
"""The fates of unsafe images: nobody looks for them; they are flagged; they are flagged and made black."""

RESIZES = ("stretch", "crop")
"""The ways to resize an image of another shape: it is stretched, or its middle is cut out."""

LONGEST_SEQUENCE = 512
"""Most tokens of a T5 text encoder, as in diffusers."""

_SEED = Whole(0, 2**64 - 1)
_SCORE = Number(0, 10)
_SIZE = Pair(1, 65_536, between="x", example="a width and a height as 1024x768")
_PLACE = Pair(0, 65_536, between=",", example="pixels from the left and from the top as 0,64")


class RequestOptions(TypedDict, total=False):
    """Keywords of a request besides the prompt; ``None`` stands for the default.

    ``image``, ``mask`` and ``ip_adapter_image`` are images where a pipeline is called, and records of them in a
    :class:`~latentrt.runtime.request.request.Request`.
    """

    negative_prompt: Annotated[
        str,
        Option(
            "text to steer away from",
            Text(),
            default="",
            by_family=True,
            two_predictions=True,
            metavar="TEXT",
            label="",
        ),
    ]
    steps: Annotated[
        int | None,
        Option(
            "sampler steps",
            Whole(1, MAX_STEPS),
            "A sampler of second order calls the model twice in a step. Timesteps or sigmas decide the number.",
            from_bundle=True,
            metavar="N",
            label="",
        ),
    ]
    guidance: Annotated[
        float | None,
        Option(
            "scale of classifier-free guidance; 1 is none",
            Number(0, 1000, hint=" (7.5 is usual, 1 is none)"),
            "At 1 or below the unconditional half is not computed, and a step costs half.",
            from_bundle=True,
            metavar="G",
            label="",
        ),
    ]
    seed: Annotated[
        int | None,
        Option(
            "seed of the noise, as torch's CPU generator takes it",
            _SEED,
            otherwise="drawn at random",
            metavar="S",
            label="",
        ),
    ]
    sampler: Annotated[
        str | None,
        Option("name of the sampler", Choice(tuple(SAMPLERS), many=True), from_bundle=True, metavar="NAME", label=""),
    ]
    width: Annotated[int | None, Option("width in pixels", Side(MAX_SIDE), from_bundle=True, metavar="W", label="")]
    height: Annotated[int | None, Option("height in pixels", Side(MAX_SIDE), from_bundle=True, metavar="H", label="")]
    images: Annotated[
        int, Option("images to draw, all from one noise stream", Whole(1, 4096), default=1, metavar="K", label="")
    ]
    clip_skip: Annotated[
        int | None,
        Option(
            "layers of the text encoder to leave out",
            Whole(0, 1),
            "The negative prompt always takes all layers, as in diffusers.",
            from_bundle=True,
            neutral=0,
            by_family=True,
            metavar="L",
            label="",
        ),
    ]
    guidance_start: Annotated[
        float,
        Option(
            "fraction of the run at which guidance begins",
            Number(0, 1),
            "Before it the unconditional half is not computed (Kynkäänniemi et al. 2024, arXiv 2404.07724).",
            default=0.0,
            two_predictions=True,
            metavar="F",
        ),
    ]
    guidance_end: Annotated[
        float,
        Option(
            "fraction of the run at which guidance ends", Number(0, 1), default=1.0, two_predictions=True, metavar="F"
        ),
    ]
    guidance_rescale: Annotated[
        float,
        Option(
            "share of a prediction whose contrast is brought back to that of the conditional one",
            Number(0, 1),
            "Lin et al. 2023, arXiv 2305.08891, section 3.4.",
            default=0.0,
            two_predictions=True,
            metavar="R",
        ),
    ]
    eta: Annotated[
        float | None,
        Option(
            "amount of fresh noise, for the samplers ddim and tcd", Number(0, 1), otherwise="the sampler's", metavar="E"
        ),
    ]
    timesteps: Annotated[
        Sequence[float] | None,
        Option(
            "timesteps to visit, descending, in place of steps",
            Levels(MAX_STEPS),
            otherwise="the sampler's",
            metavar="T,T,...",
        ),
    ]
    sigmas: Annotated[
        Sequence[float] | None,
        Option(
            "noise levels to visit, descending, in place of steps",
            Levels(MAX_STEPS),
            "They have the form that the sampler's diffusers class takes.",
            otherwise="the sampler's",
            metavar="S,S,...",
        ),
    ]
    denoising_start: Annotated[
        float | None,
        Option(
            "fraction of the trained timesteps, counted from pure noise, at which the run goes on from given latents",
            Fraction(),
            otherwise="the start",
            flag=False,
            label="",
        ),
    ]
    denoising_end: Annotated[
        float | None,
        Option(
            "fraction of the trained timesteps at which the run ends, with noise left for another model to remove",
            Fraction(),
            otherwise="the end",
            flag=False,
            label="",
        ),
    ]
    output: Annotated[
        str | None,
        Option(
            "result of the request: images, or latents alone",
            Choice(OUTPUTS),
            otherwise="latent with denoising_end, else image",
            flag=False,  # latentrt generate writes images, and --output is the file
            label="",
        ),
    ]
    decoder: Annotated[
        str | None,
        Option(
            "decoder that draws the pixels: the model's own, or a tiny one where the bundle has one",
            Decoder(DECODERS),
            default="full",
            label="",
        ),
    ]
    vae_tiling: Annotated[
        Tiling | int | bool | None,
        Option(
            "tiles in which the autoencoder decodes and encodes large images, to save memory",
            Tiles(),
            "A number is the side of a tile in pixels; true stands for tiles of 512 pixels, and false for none.",
            otherwise="whole images",
            flag=False,  # three arguments describe tiles on a command line
        ),
    ]
    prompt_2: Annotated[
        str | None,
        Option("prompt of a second text encoder", Text(), otherwise="the prompt", by_family=True, metavar="TEXT"),
    ]
    negative_prompt_2: Annotated[
        str | None,
        Option(
            "negative prompt of a second text encoder",
            Text(),
            otherwise="the negative prompt",
            by_family=True,
            two_predictions=True,
            metavar="TEXT",
        ),
    ]
    original_size: Annotated[
        tuple[int, int] | None,
        Option(
            "original size of the image, in pixels, that the model is conditioned on; a small one gives a blurry image",
            _SIZE,
            otherwise="the image's",
            by_family=True,
            metavar="WxH",
        ),
    ]
    crop: Annotated[
        tuple[int, int] | None,
        Option(
            "left and top of the cut-out, in pixels, that the model is conditioned on",
            _PLACE,
            otherwise="0,0",
            by_family=True,
            metavar="X,Y",
        ),
    ]
    target_size: Annotated[
        tuple[int, int] | None,
        Option(
            "final size of the image, in pixels, that the model is conditioned on",
            _SIZE,
            otherwise="the image's",
            by_family=True,
            metavar="WxH",
        ),
    ]
    negative_original_size: Annotated[
        tuple[int, int] | None,
        Option(
            "original size to steer away from, together with negative_target_size",
            _SIZE,
            otherwise="as for the prompt",
            by_family=True,
            two_predictions=True,
            metavar="WxH",
        ),
    ]
    negative_crop: Annotated[
        tuple[int, int] | None,
        Option(
            "left and top of the cut-out to steer away from",
            _PLACE,
            otherwise="0,0 with negative_original_size, else as for the prompt",
            by_family=True,
            two_predictions=True,
            metavar="X,Y",
        ),
    ]
    negative_target_size: Annotated[
        tuple[int, int] | None,
        Option(
            "final size to steer away from, together with negative_original_size",
            _SIZE,
            otherwise="as for the prompt",
            by_family=True,
            two_predictions=True,
            metavar="WxH",
        ),
    ]
    aesthetic_score: Annotated[
        float | None,
        Option("aesthetic score that a refiner is conditioned on", _SCORE, otherwise="6", by_family=True, metavar="A"),
    ]
    negative_aesthetic_score: Annotated[
        float | None,
        Option(
            "aesthetic score to steer a refiner away from",
            _SCORE,
            otherwise="2.5",
            by_family=True,
            two_predictions=True,
            metavar="A",
        ),
    ]
    prompt_3: Annotated[
        str | None,
        Option("prompt of a third text encoder", Text(), otherwise="the prompt", by_family=True, metavar="TEXT"),
    ]
    negative_prompt_3: Annotated[
        str | None,
        Option(
            "negative prompt of a third text encoder",
            Text(),
            otherwise="the negative prompt",
            by_family=True,
            two_predictions=True,
            metavar="TEXT",
        ),
    ]
    max_sequence_length: Annotated[
        int | None,
        Option(
            "tokens of a T5 text encoder, padding included",
            Whole(1, LONGEST_SEQUENCE),
            otherwise="the family's",
            by_family=True,
            metavar="L",
        ),
    ]
    prompt_syntax: Annotated[
        str | None,
        Option(
            "how prompts are read: as they are, the same in chunks, or with weights as (red dress:1.2)",
            Choice(SYNTAXES),
            default=SYNTAXES[0],
            by_family=True,
        ),
    ]
    image: Annotated[
        Picture | PictureRecord | None,
        Option("image to begin with; it decides the size", InputImage(), otherwise="pure noise", metavar="FILE"),
    ]
    mask: Annotated[
        Picture | PictureRecord | None,
        Option(
            "image of the same size that is white where it is painted anew",
            InputImage(),
            otherwise="everywhere",
            needs="image",
            metavar="FILE",
        ),
    ]
    strength: Annotated[
        float | None,
        Option(
            "how much of the image to change: the share of the steps that are taken",
            Number(0, 1, above=True),
            otherwise="the family's; 1 with a mask",
            needs="image",
            metavar="S",
            label="Denoising strength",  # as the web UI calls it
        ),
    ]
    resize: Annotated[
        str | None,
        Option(
            "for an image of another shape: stretch it, or cut out its middle",
            Choice(RESIZES),
            otherwise=RESIZES[0],
            needs="image",
        ),
    ]
    mask_blur: Annotated[
        float | None,
        Option(
            "radius by which the mask is blurred, in pixels",
            Number(0, 1024),
            otherwise="0",
            needs="mask",
            metavar="PIXELS",
        ),
    ]
    mask_padding: Annotated[
        int | None,
        Option(
            "pixels around the mask: only that part of the image is drawn, at the request's size, and put back",
            Whole(0, MAX_SIDE),
            otherwise="all of the image",
            needs="mask",
            metavar="PIXELS",
        ),
    ]
    keep_outside: Annotated[
        bool | None,
        Option(
            "put the result into the image through the mask, so that nothing outside of the mask changes",
            Flag(),
            otherwise="false; true with mask_padding",
            needs="mask",
        ),
    ]
    variation_seed: Annotated[
        int | None,
        Option(
            "seed of the noise that the seed's own is turned towards",
            _SEED,
            otherwise="drawn at random",
            needs="variation_strength",
            metavar="S",
        ),
    ]
    variation_strength: Annotated[
        float | None,
        Option(
            "strength of the turn towards the noise of the variation's seed",
            Number(0, 1),
            otherwise="0",
            metavar="V",
            label="Variation seed strength",  # as the web UI calls it
        ),
    ]
    control: Annotated[
        Sequence[Control] | None,
        Option(
            "image that a ControlNet of the bundle steers by, how much, and in which part of the run",
            Controls(),
            default=(),
            otherwise="none",
            metavar="NAME=FILE[:SCALE[:START[:END]]]",
            label="",  # each ControlNet has an entry
        ),
    ]
    guess_mode: Annotated[
        bool,
        Option(
            "let ControlNets act on the conditional half of guidance alone, and less on finer levels",
            Flag(),
            "Zhang et al. 2023, arXiv 2302.05543, section 3.4 of the first version.",
            default=False,
            needs="control",
        ),
    ]
    safety: Annotated[
        str | None,
        Option(
            "what happens to unsafe images: nobody looks for them, they are flagged, or flagged and made black",
            Safety(SAFETY),
            default=SAFETY[0],
        ),
    ]
    ip_adapter_image: Annotated[
        Picture | PictureRecord | None,
        Option(
            "image that is part of the prompt, where the bundle has an IP-Adapter",
            InputImage(),
            otherwise="none",
            metavar="FILE",
            label="",  # it has an entry together with its scale
        ),
    ]
    ip_adapter_scale: Annotated[
        float | None,
        Option(
            "how much the image in the prompt counts",
            Number(0, 10),
            otherwise="1",
            needs="ip_adapter_image",
            metavar="S",
            label="",
        ),
    ]


def _declared() -> dict[str, Option]:
    found: dict[str, Option] = {}
    for name, annotated in typing.get_type_hints(RequestOptions, include_extras=True).items():
        hint, option = typing.get_args(annotated)
        found[name] = dataclasses.replace(option, name=name, hint=hint)
    return found


OPTIONS: Mapping[str, Option] = types.MappingProxyType(_declared())
"""All options by name, in the order in which people read of them."""

FAMILY_OPTIONS = tuple(name for name, option in OPTIONS.items() if option.by_family)
"""Options that some families of models lack."""


def require_known(options: Mapping[str, Any]) -> None:
    """Refuse options that no request has.

    Raises:
        InvalidRequestError: naming the first in the alphabet, and all that are known.
    """
    if unknown := options.keys() - OPTIONS.keys():
        raise InvalidRequestError(f"unknown option {min(unknown)!r}; known options: {', '.join(OPTIONS)}")


def require_needed(values: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing without another one which is missing.

    Args:
        values: By option; missing or ``None`` where it is not given.

    Raises:
        InvalidRequestError: naming the first such option, and the one that it needs.
    """
    for name, option in OPTIONS.items():
        if not option.used(values.get(name)):
            continue
        missing, needed = None, option.needs
        while needed is not None and not OPTIONS[needed].used(values.get(needed)):
            missing, needed = needed, OPTIONS[needed].needs
        if missing is not None:
            meaning = OPTIONS[missing].help.partition(";")[0]
            raise InvalidRequestError(
                f"{name} is given without {missing}, the {meaning}; give both, or leave {name} out"
            )
