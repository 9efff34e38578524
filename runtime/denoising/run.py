"""A request in flight: its state from its first latents to its last."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from latentrt.engines import Array
from latentrt.engines.device import DeviceArray, to_numpy

from ..engine_calls import Conditioning, Floats
from ..images.masks import Paste
from ..request.request import Request
from ..samplers.noise import Noise
from ..samplers.plan import Plan


class Advancer(Protocol):
    """The loop of a run, as far as the run's holder needs to know it."""

    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run one step further."""
        ...


@dataclass(frozen=True)
class ControlState:
    """A ControlNet of a request in flight.

    Attributes:
        name: The ControlNet's name in the bundle.
        embedded: The control image after the ControlNet's image stage, float32 ``[images, channels, h, w]``.
        scales: The factor on each of its residuals, float32 ``[residuals]``.
        steers: Whether the ControlNet acts, for each row of the plan.
        schedule: The ControlNet's share of :attr:`Run.schedule`.
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
        conditioning: The conditioning of its texts: the unconditional one first if the request is guided, the
            conditional one last.
        generator: The source of all its noise.
        registers: float32 ``[images, R, ...]``, where ``...`` is the shape of one latent, such as ``channels, h, w``;
            the first register is the latent. After a step of an engine that works on a device they stay there.
        index: The plan's row to run next.
        rows: The denoiser's conditioning for one call: all unconditional rows, then all conditional ones.
        schedule: The output of the schedule stage: by name ``[rows of the plan, 1 or texts, ...]``.
        begun: The latents that it began with, if the request has an image.
        controls: Its ControlNets.
        kept: Inputs that its steps have in common, once they were put together.
        loop: The loop that advances it, with the weights that were in place when it began.
        flagged: For each image, whether the safety checker calls it unsafe, set when the run is finished; ``None``
            where nothing was checked.
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
    loop: Advancer | None = field(default=None, repr=False)
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
        """float32 ``[images, ...]``; a view that the next step leaves behind, or a copy from the device."""
        return to_numpy(self.registers)[:, 0]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of :attr:`latents`, the images first; nothing is copied to learn it."""
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
        """Noise for the next step, float32 of :attr:`latent_shape`; ``None`` where the plan draws none.

        It stays the same until the step was taken: a step that failed may be taken again.
        """
        if not self.plan.uses_noise[self.index]:
            return None
        if self._drawn is None or self._drawn[0] != self.index:
            self._drawn = self.index, self.generator.randn(self.latent_shape)
        return self._drawn[1]

    def conditioning_rows(self, first: int, last: int) -> dict[str, Array]:
        """Conditioning of the next call, one row an image and half.

        Args:
            first: The first image.
            last: The image after the last.
        """
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
    """The part of an image that inpainting leaves unchanged.

    Attributes:
        sample: Latents of the image, float32 ``[1, ...]``.
        noise: Unit normal noise of the run, float32 ``[images, ...]``.
        mask: float32, broadcast over latents, ``[1, 1, h, w]``: 1 where the image is painted, 0 where it is kept.
    """

    sample: Floats = field(repr=False)
    noise: Floats = field(repr=False)
    mask: Floats = field(repr=False)

    def restore(self, plan: Plan, index: int, registers: Floats | DeviceArray) -> Floats:
        """Put the image back outside the mask, with the noise level that the latents have before a row.

        Args:
            plan: The run's plan.
            index: The row that comes next, or the number of rows.
            registers: float32 ``[images, R, ...]``; they stay unchanged.

        Returns:
            The new registers, on the host.
        """
        found = np.array(to_numpy(registers), np.float32)
        outside = plan.noised(index, self.sample, self.noise)
        found[:, 0] = (1 - self.mask) * outside + self.mask * found[:, 0]
        return found


@dataclass(frozen=True)
class PreparedLatents:
    """The latents that a run begins with, where its request has an image.

    Attributes:
        latents: Its first register, float32 ``[images, ...]``.
        kept: The part of the image to put back after every step.
        paste: How the final images are put into the image that was given.
        conditioning: Inputs of a denoiser that was made for inpainting, one row each.
    """

    latents: Floats = field(repr=False)
    kept: InpaintBlend | None = None
    paste: Paste | None = None
    conditioning: Mapping[str, Floats] = field(default_factory=dict, repr=False)
