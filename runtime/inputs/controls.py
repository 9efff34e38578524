"""Control images of a request, checked against the bundle's ControlNets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.checks import check_number
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import Manifest
from ..images.reading import read_picture
from ..request.control import Control, controlnets_of

MOST_CONTROLS = 8
"""Most ControlNets of one request."""


_LARGEST_SCALE = 10.0


def take_controls(
    options: Mapping[str, Any], manifest: Manifest
) -> tuple[dict[str, Any], tuple[NDArray[np.uint8], ...]]:
    """Take control images out of a request's options, and check everything else about them.

    Args:
        options: With or without ``control``: a :class:`Control`, a mapping of its fields, or a list of those.
        manifest: The bundle's.

    Returns:
        The options with records in the place of images, and the images, uint8 ``[h, w, 3]``, each of its own size.

    Raises:
        InvalidRequestError: if a value is wrong, an image cannot be read, or the bundle has no such ControlNet.
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
    images = [read_picture(each.image, f"control[{number}].image") for number, each in enumerate(checked)]
    if checked:
        rest["control"] = tuple(replace(each, image=image.record) for each, image in zip(checked, images, strict=True))
    return rest, tuple(image.pixels for image in images)


def _checked(entry: object, where: str, manifest: Manifest) -> Control:
    known = [each.name for each in fields(Control)]
    if isinstance(entry, Mapping):
        if unknown := [key for key in entry if key not in known]:
            raise InvalidRequestError(f"{where} has the unknown entry {unknown[0]!r}, expected {', '.join(known)}")
        if "image" not in entry:
            raise InvalidRequestError(f"{where} has no image; give the image to steer by")
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
        check_number(f"{where}.{key}", getattr(entry, key), 0, most)
        for key, most in (("scale", _LARGEST_SCALE), ("start", 1.0), ("end", 1.0))
    )
    if start >= end:
        raise InvalidRequestError(f"{where}.start is {start:g}, expected less than its end, which is {end:g}")
    return Control(entry.image, name or there[0], scale, start, end)
