"""Results: the state after each step, and the output of a request with the time that it took."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.device import DeviceArray, to_numpy
from latentrt.engines.errors import InvalidRequestError

from ..denoising.run import Run
from ..engine_calls import Floats
from ..request.request import Request


@dataclass(frozen=True)
class StepInfo:
    """State of the loop after one call of the denoiser.

    Attributes:
        index: Number of this call, from 0.
        total: Number of calls of the whole run.
        timestep: Timestep that the denoiser was called at.
        elapsed: Seconds that this step took.
        registers: The sampler's state, float32 ``[images, R, ...]``, where ``...`` is the shape of one latent, such as
            ``channels, height / factor, width / factor``. It is where the engine left it: on a GPU nothing is copied
            unless somebody looks.
        scale: Factor that brings latents with noise to about the size of those without.
    """

    index: int
    total: int
    timestep: float
    elapsed: float
    registers: Floats | DeviceArray = field(repr=False)
    scale: float = 1.0

    @functools.cached_property
    def latents(self) -> Floats:
        """float32 ``[images, ...]``, a copy, which is made when it is first asked for.

        Latents of images are ``[images, channels, height / factor, width / factor]``.
        """
        return to_numpy(self.registers)[:, 0].copy()


@dataclass
class Timings:
    """Seconds spent in each stage of a request.

    Attributes:
        text_encoder: Tokenizer and text encoder.
        prompt: The denoiser's prompt stage; 0 where the bundle has none.
        schedule: Compiling the sampler's plan, and the denoiser's schedule stage where the bundle has one.
        step: Each step of the loop.
        vae_decoder: Decoding the latents.
        vae_encoder: Encoding the request's image.
        safety_checker: Checking the images, where the request asks for it.
        total: The sum of all.
    """

    text_encoder: float = 0.0
    prompt: float = 0.0
    schedule: float = 0.0
    step: list[float] = field(default_factory=list)
    vae_decoder: float = 0.0
    vae_encoder: float = 0.0
    safety_checker: float = 0.0
    total: float = 0.0

    def add_up(self) -> None:
        """Set :attr:`total`."""
        self.total = self.text_encoder + self.prompt + self.schedule + sum(self.step)
        self.total += self.vae_decoder + self.vae_encoder + self.safety_checker


@dataclass(frozen=True)
class Result:
    """The output of a request.

    Attributes:
        payload: The output, of the shape and element type of its kind, see
            :class:`~latentrt.runtime.output.kinds.OutputKind`; without entries where ``output`` is ``"latent"``.
        latents: float32 ``[images, ...]``, of images ``[images, channels, height / factor, width / factor]``.
        timings: Seconds of each stage.
        request: The request with every default filled in, the seed among them.
        truncated: Tokens of prompt and negative prompt that did not fit the text encoder and were cut off.
        flagged: Which images the safety checker takes for unsafe; ``None`` where nothing was checked.
        kind: The output kind, a key of :data:`~latentrt.runtime.output.kinds.OUTPUT_KINDS`.
    """

    payload: NDArray[Any]
    latents: Floats
    timings: Timings
    request: Request
    truncated: int
    flagged: tuple[bool, ...] | None = None
    kind: str = "image"

    @property
    def images(self) -> NDArray[np.uint8]:
        """uint8 ``[images, height, width, 3]``; ``[0, height, width, 3]`` where ``output`` is ``"latent"``.

        Raises:
            InvalidRequestError: if the output is of another kind.
        """
        if self.kind != "image":
            raise InvalidRequestError(f"the result is {self.kind}, and has no images; take its payload")
        return self.payload


def stacked_registers(runs: Sequence[Run]) -> Floats | DeviceArray:
    """The registers of several runs, concatenated on the host; those of a single run stay where they are."""
    return runs[0].registers if len(runs) == 1 else np.concatenate([to_numpy(run.registers) for run in runs])
