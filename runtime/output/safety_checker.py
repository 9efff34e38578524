"""Flagging images that a safety checker calls unsafe, for bundles that have one and requests that ask for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.errors import BundleError

from ..bundle.manifest import SAFETY_CHECKER
from ..engine_calls import Floats, outputs_of
from ..images.clip_vision import clip_pixels, clip_side

CONCEPT_SCORES, SPECIAL_SCORES = "concept_scores", "special_care_scores"
"""The component's outputs, float32 ``[batch, concepts]``: by how much an image's cosines with embeddings of concepts
exceed their thresholds, for concepts that flag it and for those that call for special care."""

_ADJUSTMENT = np.float32(0.01)
_DIGITS = 3


def verdicts(concepts: Floats, special: Floats) -> NDArray[np.bool_]:
    """Which images are unsafe, as diffusers' ``StableDiffusionSafetyChecker`` decides it.

    Scores are rounded to three digits. Where a score of special care is above zero, those of all concepts are raised by
    0.01; an image is unsafe where one of these is above zero. (In diffusers a score of special care raises the
    following ones of its own kind too, which changes nothing.)

    Args:
        concepts: float32 ``[images, concepts]``, see :data:`CONCEPT_SCORES`.
        special: float32 ``[images, special concepts]``, see :data:`SPECIAL_SCORES`.

    Returns:
        bool ``[images]``.
    """
    careful = (np.round(special, _DIGITS) > 0).any(axis=1, keepdims=True)
    raised = np.round(concepts + _ADJUSTMENT * careful, _DIGITS) > 0
    flagged: NDArray[np.bool_] = np.asarray(raised.any(axis=1))
    return flagged


def flag_images(engine: Engine, images: NDArray[np.uint8]) -> tuple[bool, ...]:
    """For each image, whether a safety checker calls it unsafe.

    Args:
        engine: The opened engine of the component.
        images: uint8 ``[images, height, width, 3]``; they are checked one by one.

    Raises:
        EngineError: if the engine fails, or computes values that are not finite.
        BundleError: if it is no safety checker.
    """
    side, found = clip_side(engine, SAFETY_CHECKER), []
    for image in images:
        scores = outputs_of(
            engine, SAFETY_CHECKER, (CONCEPT_SCORES, SPECIAL_SCORES), {"pixel_values": clip_pixels(image, side)}
        )
        if any(each.ndim != 2 or len(each) != 1 for each in scores.values()):
            raise BundleError(f"{SAFETY_CHECKER} gives no row of scores for an image; build the bundle again")
        found.append(bool(verdicts(scores[CONCEPT_SCORES], scores[SPECIAL_SCORES])[0]))
    return tuple(found)


def check_images(
    engine: Callable[[str], Engine], images: NDArray[np.uint8], safety: str
) -> tuple[NDArray[np.uint8], tuple[bool, ...] | None]:
    """Check images, and make the unsafe ones black if the request asks for that.

    Args:
        engine: Gives the opened engine of a component.
        images: uint8 ``[images, height, width, 3]``.
        safety: One of :data:`latentrt.runtime.request.options.SAFETY`.

    Returns:
        The images; and which are flagged, ``None`` where none is checked.

    Raises:
        EngineError: if the engine fails, or computes values that are not finite.
        BundleError: if the bundle has no safety checker.
    """
    if safety == "off":
        return images, None
    flagged = flag_images(engine(SAFETY_CHECKER), images)
    if safety == "black" and any(flagged):
        images = np.where(np.array(flagged)[:, None, None, None], np.uint8(0), images)
    return images, flagged
