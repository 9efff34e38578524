"""Pictures as part of the prompt, for bundles that were built with an IP-Adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.errors import InvalidRequestError

from .clip_vision import clip_pixels, clip_side
from .families import Family
from .loop import outputs_of
from .manifest import IMAGE_ENCODER, Manifest
from .pictures import read_picture
from .run import Conditioning

TOKENS, SCALE = "image_tokens", "image_scale"
"""What the denoiser is told of a picture: tokens ``[rows, 4, width]``, and how much of it ``[rows]``."""


def take_image_prompt(
    options: Mapping[str, Any], manifest: Manifest
) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    """Take ``ip_adapter_image`` out of a request's options.

    Returns:
        The options with a record in the place of the picture, and the picture, uint8 ``[h, w, 3]``.

    Raises:
        InvalidRequestError: if it cannot be read, or the bundle has no IP-Adapter.
    """
    rest = {name: value for name, value in options.items() if name != "ip_adapter_image"}
    given = options.get("ip_adapter_image")
    if given is None:
        if rest.get("ip_adapter_scale") is not None:
            raise InvalidRequestError("ip_adapter_scale is given without ip_adapter_image; give both or neither")
        return rest, None
    if IMAGE_ENCODER not in manifest.components:
        raise InvalidRequestError(
            "ip_adapter_image is given, but the bundle has no IP-Adapter; build it again with --ip-adapter FILE "
            "--image-encoder DIR"
        )
    picture = read_picture(given, "ip_adapter_image")
    return {**rest, "ip_adapter_image": picture.record}, picture.pixels


def encode_picture(engine: Engine, pixels: NDArray[np.uint8], scale: float) -> tuple[Conditioning, Conditioning]:
    """What the denoiser is told of a picture: in the unconditional half, where that is no picture, and in the other.

    Raises:
        EngineError: if the engine fails.
        BundleError: if it is no image encoder.
    """
    feeds = {"pixel_values": clip_pixels(pixels, clip_side(engine, IMAGE_ENCODER))}
    found = outputs_of(engine, IMAGE_ENCODER, (TOKENS, f"no_{TOKENS}"), feeds)
    much = np.full(1, scale, np.float32)
    return {TOKENS: found[f"no_{TOKENS}"], SCALE: much}, {TOKENS: found[TOKENS], SCALE: much}


def no_picture(family: Family) -> Conditioning:
    """What a denoiser that could be told a picture is told where there is none: then it is as without an adapter."""
    if IMAGE_ENCODER not in family.manifest.components:
        return {}
    return {TOKENS: family.zeros(TOKENS), SCALE: np.zeros(1, np.float32)}
