"""What a request says of ControlNets: which, with which picture, how much, and in which part of the run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.engines.errors import InvalidRequestError

from .manifest import CONTROL_NAME, CONTROLNET, Manifest, controlled
from .pictures import Picture, PictureRecord, read_picture

MOST_CONTROLS = 8
"""Most ControlNets of one request."""

_LARGEST_SCALE = 10.0
_NETS = re.compile(rf"{CONTROLNET}({CONTROL_NAME})", re.ASCII)


@dataclass(frozen=True)
class Control:
    """A ControlNet of a request.

    Attributes:
        image: What steers, such as edges or depths: a picture, resized to that of the request; in a request that was
            checked, what is kept of it.
        name: Which ControlNet of the bundle; ``None`` is its only one.
        scale: How much, 0 to 10.
        start: Fraction of the run from which on it steers.
        end: Fraction of the run up to which it steers.
    """

    image: Picture | PictureRecord
    name: str | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def told(self) -> str:
        """For people and for the text of a picture, in the order in which the web UI's extension has it."""
        picture = self.image.path or self.image.sha256 if isinstance(self.image, PictureRecord) else "a picture"
        parts = {"Model": self.name, "Weight": self.scale, "Guidance Start": self.start, "Guidance End": self.end}
        return ", ".join(f"{label}: {value}" for label, value in {**parts, "Image": picture}.items())


def controlnets_of(manifest: Manifest) -> tuple[str, ...]:
    """Names of a bundle's ControlNets."""
    return tuple(match[1] for name in manifest.components if (match := _NETS.fullmatch(name)))


def take_controls(
    options: Mapping[str, Any], manifest: Manifest
) -> tuple[dict[str, Any], tuple[NDArray[np.uint8], ...]]:
    """Take control images out of a request's options, and check everything else about them.

    Args:
        options: With or without ``control``: a :class:`Control`, a mapping of its fields, or a list of those.
        manifest: The bundle's.

    Returns:
        The options with records in the place of pictures, and the pictures, uint8 ``[h, w, 3]``, each of its own size.

    Raises:
        InvalidRequestError: if a value is wrong, a picture cannot be read, or the bundle has no such ControlNet.
    """
    rest = {name: value for name, value in options.items() if name != "control"}
    given = options.get("control")
    if given is None:
        return rest, ()
    entries = [given] if isinstance(given, Control | Mapping) else given
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        raise InvalidRequestError(f"control is a {type(given).__name__}, expected a Control, or a list of them")
    if len(entries) > MOST_CONTROLS:
        raise InvalidRequestError(f"control has {len(entries)} entries, expected at most {MOST_CONTROLS}")
    checked = [_checked(entry, f"control[{number}]", manifest) for number, entry in enumerate(entries)]
    for control in checked:
        if sum(each.name == control.name for each in checked) > 1:
            raise InvalidRequestError(f"control names {control.name!r} twice; give each ControlNet once")
    pictures = [read_picture(each.image, f"control[{number}].image") for number, each in enumerate(checked)]
    if checked:
        rest["control"] = tuple(
            replace(each, image=picture.record) for each, picture in zip(checked, pictures, strict=True)
        )
    return rest, tuple(picture.pixels for picture in pictures)


def _checked(entry: object, where: str, manifest: Manifest) -> Control:
    known = [each.name for each in fields(Control)]
    if isinstance(entry, Mapping):
        if unknown := [key for key in entry if key not in known]:
            raise InvalidRequestError(f"{where} has the unknown entry {unknown[0]!r}, expected {', '.join(known)}")
        if "image" not in entry:
            raise InvalidRequestError(f"{where} has no image; give the picture that steers")
        entry = Control(**entry)
    if not isinstance(entry, Control):
        raise InvalidRequestError(f"{where} is a {type(entry).__name__}, expected a Control")
    there, name = controlnets_of(manifest), entry.name
    if not there:
        raise InvalidRequestError(
            "control is given, but the bundle has no ControlNet; build it again with --controlnet NAME=DIR"
        )
    if name is None and len(there) > 1:
        raise InvalidRequestError(f"{where} names no ControlNet; the bundle has {', '.join(there)}")
    if name is not None and name not in there:
        raise InvalidRequestError(f"{where} names {name!r}, but the bundle's ControlNets are {', '.join(there)}")
    scale, start, end = (
        _number(f"{where}.{key}", getattr(entry, key), most)
        for key, most in (("scale", _LARGEST_SCALE), ("start", 1.0), ("end", 1.0))
    )
    if start >= end:
        raise InvalidRequestError(f"{where}.start is {start:g}, expected less than its end, which is {end:g}")
    return Control(entry.image, name or there[0], scale, start, end)


def _number(where: str, value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise InvalidRequestError(f"{where} is a {type(value).__name__}, expected a number")
    if not 0 <= value <= most:  # also when it is NaN
        raise InvalidRequestError(f"{where} is {float(value):g}, expected 0 to {most:g}")
    return float(value)


def control_image(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float32]:
    """A picture as a ControlNet takes it: float32 ``[1, 3, height, width]`` from 0 to 1, resized by Lanczos' filter.

    So does diffusers; a picture of the right size stays as it is.
    """
    image = Image.fromarray(pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1)[None] / np.float32(255))


def twin_of(denoiser: str, *, fused: bool) -> str:
    """The component that takes residuals in, for one way to run the loop."""
    return f"{controlled(denoiser)}_step" if fused else controlled(denoiser)
