"""Which images of which runs go into one call of the denoiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array

from ..engine_calls import Floats
from .run import Run


@dataclass(frozen=True)
class Share:
    """The images of a run that one call of the denoiser advances: ``first`` up to, but without, ``last``."""

    run: Run
    first: int
    last: int

    def __len__(self) -> int:
        """How many images."""
        return self.last - self.first

    @property
    def whole(self) -> bool:
        """Whether these are all the images of the run."""
        return len(self) == self.run.request.images

    def rows(self, first: int = 0) -> NDArray[np.int64]:
        """The sample of each of the denoiser's rows, int64: the unconditional half, if there is one, comes first.

        Args:
            first: Number of this share's first sample within the call.
        """
        samples = first + np.arange(len(self))
        return np.concatenate([samples, samples]) if self.run.guided else samples

    def conditioning_rows(self) -> dict[str, Array]:
        """Their conditioning, one row an image and half."""
        return self.run.conditioning_rows(self.first, self.last)

    def noise(self) -> Floats | None:
        """Their noise for the next step, if the plan draws any."""
        noise = self.run.draw()
        return None if noise is None else noise[self.first : self.last]


def split_into_calls(runs: Sequence[Run], most: int | None) -> list[list[Share]]:
    """Split the images of runs, in order, into calls of at most ``most`` images, and into as few as that allows.

    Runs whose texts have different lengths do not share a call.
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


def joined(parts: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """The parts' tensors, concatenated along the first dimension; those of a single part are not copied."""
    listed = list(parts)
    if len(listed) == 1:
        return dict(listed[0])
    return {name: np.concatenate([part[name] for part in listed]) for name in listed[0]}


def _fit(one: Run, other: Run) -> bool:
    """Whether the conditioning of two runs can be concatenated: their texts have the same lengths."""
    return all(rows.shape[1:] == other.rows[name].shape[1:] for name, rows in one.rows.items() if name in other.rows)
