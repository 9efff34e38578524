"""What a pipeline hands out: the state after each step, and pictures with what they took."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.device import DeviceArray, to_numpy

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
        registers: The sampler's state, float32 ``[images, R, channels, height / factor, width / factor]``, where the
            engine left it: on a GPU nothing is copied unless somebody looks.
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
        """float32 ``[images, channels, height / factor, width / factor]``; a copy, made when it is first asked for."""
        return to_numpy(self.registers)[:, 0].copy()


@dataclass
class Timings:
    """Seconds spent in each stage of a request.

    Attributes:
        text_encoder: Tokenizer and text encoder.
        prompt: The denoiser's prompt stage; 0 where the bundle has none.
        schedule: Compiling the sampler's plan, and the denoiser's schedule stage where the bundle has one.
        step: Each step of the loop.
        vae_decoder: Decoding to pixels.
        vae_encoder: Encoding of pictures that were given.
        safety_checker: Looking at pictures, where that is asked for.
        total: All of it.
    """

    text_encoder: float = 0.0
    prompt: float = 0.0
    schedule: float = 0.0
    step: list[float] = field(default_factory=list)
    vae_decoder: float = 0.0
    vae_encoder: float = 0.0
    safety_checker: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Result:
    """What a request gave.

    Attributes:
        images: uint8 ``[images, height, width, 3]``; ``[0, height, width, 3]`` where ``output`` is ``"latent"``.
        latents: float32 ``[images, channels, height / factor, width / factor]``.
        timings: Seconds of each stage.
        request: The request with every default filled in, the seed among them.
        truncated: Tokens of prompt and negative prompt that did not fit the text encoder and were cut off.
        flagged: Which pictures the safety checker takes for unsafe; ``None`` where the request had none looked at.
    """

    images: NDArray[np.uint8]
    latents: Floats
    timings: Timings
    request: Request
    truncated: int
    flagged: tuple[bool, ...] | None = None


def stacked_registers(runs: Sequence[Run]) -> Floats | DeviceArray:
    """The states of several runs as one; that of a single one where it is."""
    return runs[0].registers if len(runs) == 1 else np.concatenate([to_numpy(run.registers) for run in runs])
