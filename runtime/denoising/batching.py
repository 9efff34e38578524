"""Which images of which runs go into one call of the denoiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latentrt.engines import Array

from ..engine_calls import Floats
from .run import Run


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


def split_into_calls(runs: Sequence[Run], most: int | None) -> list[list[Share]]:
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


def group_by_controlnets(shares: Sequence[Share]) -> list[list[Share]]:
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
