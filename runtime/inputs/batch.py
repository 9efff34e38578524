"""A batch of prompts: one request for each; they share all options but their texts and seeds."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import Manifest
from ..images.masks import InputImages
from ..request.options import MAX_PIXELS
from ..request.request import Request
from .controls import take_controls
from .create import create_request
from .image_prompt import take_image_prompt
from .latents import take_latents
from .starting_image import prepare, take_pictures

MOST_PROMPTS = 4096
"""Most prompts of one batch."""


@dataclass(frozen=True)
class Batch:
    """Requests of one size that are drawn together.

    Attributes:
        requests: One for each prompt.
        one_stream: Whether all their noise comes from one stream.
        latents: Latents that the one request begins with, float32 ``[images, ...]`` of the family's shape; ``None`` is
            the seed's noise.
        given: The image of the one request, and maybe its mask.
        control_images: The image of each entry of the requests' ``control``, uint8 ``[h, w, 3]``.
        image_prompt: The image that is part of all prompts, uint8 ``[h, w, 3]``.
    """

    requests: tuple[Request, ...]
    one_stream: bool = False
    latents: NDArray[np.float32] | None = field(default=None, repr=False)
    given: InputImages | None = None
    control_images: tuple[NDArray[np.uint8], ...] = field(default=(), repr=False)
    image_prompt: NDArray[np.uint8] | None = field(default=None, repr=False)

    @classmethod
    def single(cls, manifest: Manifest, prompt: str, options: Mapping[str, Any]) -> Batch:
        """One prompt alone.

        Raises:
            InvalidRequestError: see :func:`latentrt.runtime.inputs.create.create_request`.
        """
        rest, pictures = take_pictures(options, manifest)
        rest, latents = take_latents(rest, manifest)
        rest, controls = take_controls(rest, manifest)
        rest, prompted = take_image_prompt(rest, manifest)
        request = create_request(manifest, prompt, **rest)
        given = None if pictures is None else prepare(request, pictures)
        return cls((request,), latents=latents, given=given, control_images=controls, image_prompt=prompted)

    @classmethod
    def create(cls, manifest: Manifest, prompts: Sequence[str], options: Mapping[str, Any]) -> Batch:
        """A request for each prompt.

        Args:
            manifest: The bundle's.
            prompts: What to draw.
            options: The options of a request. ``seed`` may be a sequence with one for each prompt; one number is the
                seed of a stream that all share. Texts, such as ``negative_prompt``, may be sequences with one for each
                prompt.

        Raises:
            InvalidRequestError: if a sequence has another length than ``prompts``, the images are too many together, or
                a request is wrong.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InvalidRequestError(f"prompts is a {type(prompts).__name__}, expected a list of strings")
        for name in ("latents", "denoising_start", "image", "mask"):
            if options.get(name) is not None:
                raise InvalidRequestError(f"{name} is for one prompt at a time; leave it out")
        options = {name: value for name, value in take_pictures(options, manifest)[0].items() if name != "latents"}
        options, controls = take_controls(options, manifest)
        options, prompted = take_image_prompt(options, manifest)
        count = len(prompts)
        if not 1 <= count <= MOST_PROMPTS:
            raise InvalidRequestError(f"{count} prompts are given, expected 1 to {MOST_PROMPTS}")
        seed = options.get("seed")
        own = {name: value for name, value in options.items() if _each(name, value)}
        if seed is None:
            own["seed"] = [secrets.randbits(32) for _ in prompts]
        for name, values in own.items():
            if len(values) != count:
                raise InvalidRequestError(
                    f"{name} has {len(values)} entries for {count} prompts; give one for each, or one for all"
                )
        requests = tuple(
            create_request(manifest, prompt, **{**options, **{name: values[index] for name, values in own.items()}})
            for index, prompt in enumerate(prompts)
        )
        first = requests[0]
        if (pixels := count * first.images * first.width * first.height) > MAX_PIXELS:
            raise InvalidRequestError(
                f"{count * first.images} images of {first.width}x{first.height} have {pixels:,} pixels, "
                f"at most {MAX_PIXELS:,} fit one batch; ask for fewer or smaller ones"
            )
        return cls(requests, one_stream="seed" not in own, control_images=controls, image_prompt=prompted)


def _each(name: str, value: Any) -> bool:
    """Whether an option has an entry for each prompt, as seeds and texts may."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return False
    return name == "seed" or all(isinstance(each, str) for each in value)
