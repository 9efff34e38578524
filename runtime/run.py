"""Requests in flight, and which of their pictures go into one call of the denoiser."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array
from latentrt.engines.device import DeviceArray, to_numpy

from .noise import Noise, TorchGenerator, varied_noise
from .request import Request
from .samplers.plan import Plan
from .tasks import Begun

if TYPE_CHECKING:
    from .loop import Loop

Floats = NDArray[np.float32]
Conditioning: TypeAlias = Mapping[str, Array]
"""What one text comes to for the denoiser: tensors by name, with a leading dimension of 1."""


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
    begun: Begun | None = None
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
class Share:
    """The pictures of a run that one call of the denoiser takes further: ``first`` up to, but without, ``last``."""

    run: Run
    first: int
    last: int

    def __len__(self) -> int:
        """How many pictures."""
        return self.last - self.first

    @property
    def whole(self) -> bool:
        """Whether these are all the pictures of the run."""
        return len(self) == self.run.request.images

    def conditioning_rows(self) -> dict[str, Array]:
        """Their conditioning, one row a picture and half."""
        return self.run.conditioning_rows(self.first, self.last)

    def noise(self) -> Floats | None:
        """Their noise for the next step, if the plan draws any."""
        noise = self.run.draw()
        return None if noise is None else noise[self.first : self.last]


def shared_out(runs: Sequence[Run], most: int | None) -> list[list[Share]]:
    """Which pictures go into which call, in order: no more than ``most`` in one, and as few calls as that allows.

    Runs with texts of different lengths do not share one.
    """
    calls: list[list[Share]] = [[]]
    room = most
    for run in runs:
        if calls[-1] and not _fit(calls[-1][-1].run, run):
            calls.append([])
            room = most
        first, images = 0, run.request.images
        while first < images:
            last = images if room is None else min(images, first + room)
            calls[-1].append(Share(run, first, last))
            if room is not None and not (room := room - (last - first)):
                calls.append([])
                room = most
            first = last
    return [call for call in calls if call]


def apart_by_controls(shares: Sequence[Share]) -> list[list[Share]]:
    """Shares in calls of the same ControlNets each."""
    if not any(share.run.controls for share in shares):
        return [list(shares)]
    found: dict[tuple[str, ...], list[Share]] = {}
    for share in shares:
        found.setdefault(tuple(each.name for each in share.run.active_controls), []).append(share)
    return list(found.values())


def joined(parts: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """The parts' tensors one behind the other; those of a single part as they are."""
    listed = list(parts)
    if len(listed) == 1:
        return dict(listed[0])
    return {name: np.concatenate([part[name] for part in listed]) for name in listed[0]}


def _fit(one: Run, other: Run) -> bool:
    """Whether the conditioning of two runs can be put together: lengths of texts are the same."""
    return all(rows.shape[1:] == other.rows[name].shape[1:] for name, rows in one.rows.items() if name in other.rows)


def start_run(
    request: Request,
    plan: Plan,
    conditioning: Sequence[Conditioning],
    shape: tuple[int, int, int, int],
    generator: Noise | None = None,
    latents: Floats | None = None,
    begun: Begun | None = None,
) -> Run:
    """A run before its first step, with noise from the request's seed or from latents that are there.

    Args:
        request: The request.
        plan: Its sampler's plan.
        conditioning: Its texts, the unconditional one first if the request is guided.
        shape: Of the latents: images, channels, height, width.
        generator: Source of all its noise; ``None`` is one of its own, of the request's seed.
        latents: Unit normal noise in place of the seed's; or, with ``denoising_start``, what the run goes on from.
        begun: What it begins with instead of all that, if it was given a picture.
    """
    generator = generator or TorchGenerator(request.seed)
    registers = np.zeros((shape[0], plan.registers, *shape[1:]), np.float32)
    if begun is not None:
        registers[:, 0] = begun.latents
    elif latents is not None and request.denoising_start is not None:
        registers[:, 0] = latents
    else:
        seed, strength = request.variation_seed, request.variation_strength
        noise = varied_noise(generator, shape, seed, strength) if latents is None else latents
        np.multiply(noise, np.float32(plan.init_scale), out=registers[:, 0])
    rows = {
        name: np.concatenate([text[name].repeat(request.images, axis=0) for text in conditioning])
        for name in conditioning[-1]
    }
    return Run(request, plan, conditioning, generator, registers, rows=rows, begun=begun)
