"""Requests in flight, and which of their pictures go into one call of the denoiser."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines import Array
from latentrt.engines.device import DeviceArray, to_numpy

from ..engine_calls import Conditioning, Floats
from ..images.masks import Paste
from ..request.request import Request
from ..samplers.noise import Noise
from ..samplers.plan import Plan

if TYPE_CHECKING:
    from .loop import Loop


@dataclass(frozen=True)
class ControlState:
    """A ControlNet of a request in flight.

    Attributes:
        name: Which.
        embedded: What its control image comes to, float32 ``[images, channels, h, w]``.
        scales: How much of each of its residuals, float32 ``[residuals]``.
        steers: Whether it does, for each row of the plan.
        schedule: As of :class:`Run`.
    """

    name: str
    embedded: Floats = field(repr=False)
    scales: Floats = field(repr=False)
    steers: Sequence[bool] = field(repr=False)
    schedule: Mapping[str, Array] = field(repr=False)


@dataclass(eq=False)
class Run:
    """A request in flight, from its noise to its latents.

    Attributes:
        request: The request.
        plan: The sampler's plan.
        conditioning: Its texts: the unconditional one first if the request is guided, the conditional one last.
        generator: Source of all its noise.
        registers: float32 ``[images, R, channels, h, w]``; the first register is the latent. After a step of an engine
            that works on a device they stay there.
        index: Number of the plan's row to run next.
        rows: The denoiser's conditioning for one call: all unconditional rows, then all conditional ones.
        schedule: What the schedule stage computed: by name ``[rows of the plan, 1 or texts, ...]``.
        begun: What it began with, if it was given a picture.
        controls: Its ControlNets.
        kept: Inputs that its steps have in common, once they were put together.
        loop: What takes it further, with the weights that were in place when it began.
        flagged: Which of its pictures the safety checker takes for unsafe, once it was finished; ``None`` where it had
            none looked at.
    """

    request: Request
    plan: Plan
    conditioning: Sequence[Conditioning] = field(repr=False)
    generator: Noise = field(repr=False)
    registers: Floats | DeviceArray = field(repr=False)
    index: int = 0
    rows: Mapping[str, Array] = field(default_factory=dict, repr=False)
    schedule: Mapping[str, Array] = field(default_factory=dict, repr=False)
    begun: PreparedLatents | None = None
    controls: Sequence[ControlState] = field(default=(), repr=False)
    kept: dict[Hashable, Mapping[str, Array]] = field(default_factory=dict, init=False, repr=False)
    loop: Loop | None = field(default=None, repr=False)
    flagged: tuple[bool, ...] | None = field(default=None, init=False)
    _drawn: tuple[int, Floats] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        """Calls of the denoiser that the whole run takes."""
        return len(self.plan)

    @property
    def done(self) -> bool:
        """Whether the last step was taken."""
        return self.index == len(self.plan)

    @property
    def latents(self) -> Floats:
        """float32 ``[images, channels, h, w]``; a view that the next step leaves behind, or a copy from the device."""
        return to_numpy(self.registers)[:, 0]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Images, channels, height and width of the latents; nothing is copied to learn it."""
        return (self.registers.shape[0], *self.registers.shape[2:])

    @property
    def guided(self) -> bool:
        """Whether the next step runs the unconditional half."""
        return self.request.guided_at(self.index, len(self.plan))

    @property
    def active_controls(self) -> Sequence[ControlState]:
        """ControlNets that steer the next step."""
        if not self.controls:
            return ()
        return tuple(each for each in self.controls if each.steers[self.index])

    def draw(self) -> Floats | None:
        """Noise for the next step, float32 ``[images, channels, h, w]``; ``None`` where the plan draws none.

        It stays the same until the step was taken: one that failed may be taken again.
        """
        if not self.plan.uses_noise[self.index]:
            return None
        if self._drawn is None or self._drawn[0] != self.index:
            self._drawn = self.index, self.generator.randn(self.latent_shape)
        return self._drawn[1]

    def conditioning_rows(self, first: int, last: int) -> dict[str, Array]:
        """Conditioning of the next call for pictures ``first`` to ``last``, one row a picture and half."""
        images = self.request.images
        halves = (0, images) if self.guided else (images,) if self.request.guided else (0,)
        if last - first == images:  # the halves lie side by side
            return {name: values[halves[0] :] for name, values in self.rows.items()}
        return {
            name: np.concatenate([values[half + first : half + last] for half in halves])
            for name, values in self.rows.items()
        }


@dataclass(frozen=True)
class InpaintBlend:
    """What a run leaves as it was.

    Attributes:
        sample: Latents of the picture, float32 ``[1, channels, h, w]``.
        noise: Unit noise of the run, float32 ``[images, channels, h, w]``.
        mask: float32 ``[1, 1, h, w]``: 1 where the picture is painted, 0 where it is kept.
    """

    sample: Floats = field(repr=False)
    noise: Floats = field(repr=False)
    mask: Floats = field(repr=False)

    def restore(self, run: Run) -> None:
        """Bring what is kept back into a run's latents, with the noise of its next row; they come to the host."""
        registers = np.array(to_numpy(run.registers), np.float32)
        outside = run.plan.noised(run.index, self.sample, self.noise)
        registers[:, 0] = (1 - self.mask) * outside + self.mask * registers[:, 0]
        run.registers = registers


@dataclass(frozen=True)
class PreparedLatents:
    """What a run begins with.

    Attributes:
        latents: Its first register, float32 ``[images, channels, h, w]``.
        kept: What it brings back after every step.
        paste: What happens to its pictures in the end.
        conditioning: Inputs of a denoiser that was made for inpainting, one row each.
    """

    latents: Floats = field(repr=False)
    kept: InpaintBlend | None = None
    paste: Paste | None = None
    conditioning: Mapping[str, Floats] = field(default_factory=dict, repr=False)
