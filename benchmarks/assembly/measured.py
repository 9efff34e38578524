"""Figures of one contender, from the samples of a contest."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from latentrt.exporter.precision.quality import picture_psnr, picture_ssim

from ..contest.contenders import REFERENCES
from ..contest.rounds import STAGES, Entry
from ..report import types as t
from ..statistics import single_interval, summarize


def cold(entry: Entry) -> t.Cold | None:
    """Seconds of the cold start; ``None`` for a contender that drew nothing."""
    first = entry.cold
    if first is None:
        return None
    return {
        "import": first.importing,
        "load": first.load,
        "compile": first.compile,
        "compile_cached": first.compile_cached,
        "first_picture": first.first_picture,
        "process_to_picture": first.process_to_picture,
    }


def _groups(entry: Entry) -> dict[str, list[list[float]]]:
    """Samples of each stage that has any, by round."""
    found = {stage: [[value] for value in entry.stages[stage]] for stage in STAGES}
    found |= {"total": [[value] for value in entry.total], "step": [steps for steps in entry.step if steps]}
    return {stage: groups for stage, groups in found.items() if groups}


def summaries(entry: Entry) -> t.Summaries:
    """A summary of each stage that has samples."""
    return {stage: summarize(groups) for stage, groups in _groups(entry).items()}  # type: ignore[return-value]


def medians(entry: Entry) -> dict[str, float]:
    """Median seconds of each stage that has samples."""
    return {stage: float(np.median(np.concatenate(groups))) for stage, groups in _groups(entry).items()}


def reference(entries: Sequence[Entry]) -> Entry | None:
    """The first of :data:`~latentrt.benchmarks.contest.contenders.REFERENCES` that was opened."""
    by_name = {entry.contender.name: entry for entry in entries if entry.opened}
    return next((by_name[name] for name in REFERENCES if name in by_name), None)


def ratios(entry: Entry, reference: Entry | None) -> t.Ratios:
    """How many times as fast as the reference a contender is, from the rounds that both took part in."""
    if reference is None:
        return {}
    own = dict(zip(entry.rounds, zip(entry.total, entry.step, strict=True), strict=True))
    other = dict(zip(reference.rounds, zip(reference.total, reference.step, strict=True), strict=True))
    both = [(other[number], own[number]) for number in entry.rounds if number in other]
    totals = [theirs[0] / mine[0] for theirs, mine in both]
    steps = [median(theirs[1]) / median(mine[1]) for theirs, mine in both if theirs[1] and mine[1]]
    found: t.Ratios = {}
    if totals:
        found["total"] = {**single_interval(totals), "pairs": len(totals)}
    if steps:
        found["step"] = {**single_interval(steps), "pairs": len(steps)}
    return found


def throughput(entry: Entry, job_images: int) -> list[t.Throughput]:
    """Images a minute by number of images of a request; the job's own number is measured by the rounds."""
    by_images = {job_images: entry.total, **entry.batches} if entry.batches else {}
    return [
        {
            "images": count,
            "seconds": list(seconds),
            "per_minute": single_interval(60 * count / value for value in seconds),
        }
        for count, seconds in sorted(by_images.items())
        if seconds
    ]


def images(entry: Entry) -> NDArray[np.uint8] | None:
    """The images of a contender's first request, uint8 ``[images, height, width, 3]``; ``None`` if there are none."""
    if entry.picture is None or not entry.picture.is_file():
        return None
    pixels: NDArray[np.uint8] = np.load(entry.picture, allow_pickle=False)
    return pixels


def quality(entry: Entry, reference: Entry | None) -> t.Quality | None:
    """How close a contender's images are to the reference's; ``None`` where they cannot be compared."""
    if reference is None:
        return None
    mine, theirs = images(entry), images(reference)
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return None
    pairs = list(zip(theirs, mine, strict=True))
    return {
        "psnr": float(np.mean([picture_psnr(*pair) for pair in pairs])),
        "ssim": float(np.mean([picture_ssim(*pair) for pair in pairs])),
        "reference": reference.contender.name,
    }


def extrapolated(entry: Entry, steps: int | None) -> t.Extrapolated | None:
    """Seconds of a request with more steps: each round's own time, and its median step for every step more.

    Args:
        entry: The contender.
        steps: Number of steps; ``None`` for no estimate.
    """
    if steps is None or not any(entry.step):
        return None
    seconds = (
        total + (steps - len(taken)) * median(taken)
        for total, taken in zip(entry.total, entry.step, strict=True)
        if taken
    )
    return {"steps": steps, "seconds": single_interval(seconds)}
