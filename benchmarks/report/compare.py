"""Compare two reports of the same job: find times, memory and quality that changed by more than noise explains.

A machine that others use too is a few percent faster or slower from one run to the next. Every run therefore times a
control as well, the same work each time, once a round beside the contenders. A time is compared as

    log(sample / control of the same round),

so that a slowdown of both, in a round or for a whole run, cancels. The ratio new over old is that of two means without
their greatest and least 15 %, since other load on a machine makes a few rounds far too long; interval and degrees of
freedom are those of Yuen 1974, "The two-sample trimmed t for unequal population variances", on logarithms. (Resampling
the rounds instead gives wider intervals: where one round in ten is disturbed, it finds about half as many slowdowns.)
A contender's time has changed if

- the interval excludes 1, at a confidence at which one comparison in twenty finds any change by chance,
- the ratio is more than :data:`FLOOR` from 1 after the control, and
- the ratio of the plain times is that far from 1 too: a jump of the control alone must not make a regression.

Memory and quality have one figure a run. They count as changed if they differ by more than from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from . import figures
from .document import ReportError
from .types import ContenderReport, Report

FLOOR = 0.03
"""Least relative change of a time that counts."""

MEMORY_FLOOR, MEMORY_BYTES = 0.05, 16_000_000
"""Least change of the peak memory that counts, relative and in bytes; allocators do not repeat themselves exactly."""

PSNR_FLOOR, PSNR_EQUAL = 1.0, 60.0
"""Least change of the PSNR that counts, in dB, and where images count as equal: the error is a quarter of a level."""

MIN_ROUNDS = 4
"""Least rounds in either report to decide on a time."""

FAMILY_ERROR = 0.05
"""How often a comparison of equal reports may find any change of a time, better or worse."""

_TRIM = 0.15
_TIMES = ("total", "step", "text_encoder", "vae_decoder")
_NAMES = {
    "total": "end to end",
    "step": "step",
    "text_encoder": "text encoder",
    "vae_decoder": "VAE decode",
    "memory": "peak memory",
    "psnr": "PSNR",
    "state": "state",
}

Verdict = Literal["regression", "improvement", "unchanged", "undecided"]


@dataclass(frozen=True)
class Change:
    """One figure of one contender in both reports.

    Attributes:
        contender: The contender's name.
        label: The contender's name for people.
        kind: ``"latentrt"`` or ``"peer"``.
        figure: ``"total"``, ``"step"``, ``"text_encoder"``, ``"vae_decoder"`` (seconds), ``"memory"`` (bytes),
            ``"psnr"`` (dB), or ``"state"`` for a contender that drew images and now fails (rounds).
        old: The figure in the old report; of times, the median.
        new: The figure in the new one.
        ratio: New over old; of times, after the control. 1 for ``"psnr"`` and ``"state"``, which have no ratio.
        low: Lower end of the ratio's interval at :attr:`Comparison.confidence`; the ratio itself for single figures.
        high: Upper end.
        verdict: ``"regression"``, ``"improvement"``, ``"unchanged"`` or ``"undecided"``.
        why: The figures that decided, in one clause.
    """

    contender: str
    label: str
    kind: str
    figure: str
    old: float
    new: float
    ratio: float
    low: float
    high: float
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Comparison:
    """The changes between two reports.

    Attributes:
        changes: Every figure that both have, by contender.
        warnings: Differences that weaken the comparison, one sentence each.
        drift: The control's time, new over old.
        confidence: Confidence of the intervals of the changes.
    """

    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    drift: float
    confidence: float

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Regressions of LatentRT; those of peers do not count."""
        return tuple(c for c in self.changes if c.verdict == "regression" and c.kind == "latentrt")

    @property
    def improvements(self) -> tuple[Change, ...]:
        """Improvements of LatentRT; those of peers do not count."""
        return tuple(c for c in self.changes if c.verdict == "improvement" and c.kind == "latentrt")


def compare(old: Report, new: Report) -> Comparison:
    """Compare two reports.

    Args:
        old: The earlier report.
        new: The later one.

    Raises:
        ReportError: if they are of different jobs or models, or have no contender in common.
    """
    _check_same_job(old, new)
    pairs = list(_pairs(old, new))
    if not pairs:
        raise ReportError("the reports have no contender in common; measure the same ones in both")
    warnings = list(_warnings(old, new))
    controls = [_control(report) for report in (old, new)]
    times: list[tuple[ContenderReport, ContenderReport, str, list[_Rounds]]] = []
    for before, after in pairs:
        for stage in _TIMES:
            rounds = [_rounds(each, stage, control) for each, control in zip((before, after), controls, strict=True)]
            if all(len(each.plain) for each in rounds):
                times.append((before, after, stage, rounds))
    decided = sum(1 for before, _, _, rounds in times if before["kind"] == "latentrt" and _enough(rounds))
    error = FAMILY_ERROR / max(1, decided)
    found = {
        id(before): [_lost(before, after), _memory(before, after), _quality(before, after)] for before, after in pairs
    }
    for before, after, stage, rounds in reversed(times):
        found[id(before)].insert(1, _time(before, after, stage, rounds, error))
    if any(change is not None and change.verdict == "undecided" for each in found.values() for change in each):
        warnings.append(f"times with fewer than {MIN_ROUNDS} rounds and controls in either report are not decided on")
    drift = (
        math.exp(median(controls[1].tolist()) - median(controls[0].tolist())) if all(map(len, controls)) else math.nan
    )
    changes = tuple(change for each in found.values() for change in each if change is not None)
    return Comparison(changes, tuple(warnings), drift, 1 - error)


def to_text(comparison: Comparison) -> str:
    """The comparison for people: regressions, improvements, and every figure."""
    lines = [f"warning: {warning}" for warning in comparison.warnings]
    if math.isfinite(comparison.drift):
        lines.append(f"control: {comparison.drift:.3f} times as long as before; times are taken after it")
    peers = [c for c in comparison.changes if c.kind == "peer" and c.verdict in ("regression", "improvement")]
    for title, changes in (
        ("regressions", comparison.regressions),
        ("improvements", comparison.improvements),
        ("peers that changed (these do not count)", peers),
    ):
        if changes or title == "regressions":
            lines += ["", f"{title}:" if changes else f"{title}: none"]
            lines += [f"  {change.label}, {_NAMES[change.figure]}: {change.why}" for change in changes]
    lines += ["", f"all figures (new over old, after the control; intervals at {100 * comparison.confidence:.2f} %):"]
    rows = [
        (
            change.label,
            _NAMES[change.figure],
            _text(change.figure, change.old),
            _text(change.figure, change.new),
            "-" if change.figure in ("psnr", "state") else f"{change.ratio:.3f}",
            f"[{change.low:.3f}, {change.high:.3f}]" if change.figure in _TIMES and change.low < change.high else "-",
            change.verdict,
        )
        for change in comparison.changes
    ]
    header = ("contender", "figure", "old", "new", "ratio", "interval", "")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines)


@dataclass(frozen=True)
class _Rounds:
    """Logarithms of a contender's times, one a round, without and with the control subtracted."""

    plain: NDArray[np.float64]
    controlled: NDArray[np.float64]


@dataclass(frozen=True)
class _Trimmed:
    """A trimmed mean, the square of its standard error, and its degrees of freedom."""

    mean: float
    square: float
    freedom: int


def _trimmed(values: NDArray[np.float64]) -> _Trimmed:
    """Mean without the least and the greatest values; for its error, these are replaced by the nearest ones kept."""
    count, cut = len(values), int(_TRIM * len(values))
    inner = np.sort(values)[cut : count - cut]
    winsorised = values.clip(inner[0], inner[-1])
    kept = len(inner)
    return _Trimmed(
        float(inner.mean()), float(np.square(winsorised - winsorised.mean()).sum() / (kept * (kept - 1))), kept - 1
    )


@cache
def _student(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution, of 3 degrees of freedom or more.

    With x = sqrt(freedom) * tan(angle) its density is that of cos(angle) ** (freedom - 1), on a finite range.
    """
    angles = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.cos(angles).clip(0) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(probability * mass[-1], mass, angles)))


def _control(report: Report) -> NDArray[np.float64]:
    """Logarithm of the control's time in each round; its median where a round has several."""
    samples, rounds = report["control"]["samples"], report["method"]["rounds_done"]
    if min(samples, default=0) <= 0:
        return np.zeros(0)
    several = len(samples) // rounds if rounds and len(samples) % rounds == 0 else 1
    return np.log([median(samples[first : first + several]) for first in range(0, len(samples), several)])


def _rounds(contender: ContenderReport, stage: str, control: NDArray[np.float64]) -> _Rounds:
    """A contender's times by round; a round's steps are one figure, their median, since they are not independent."""
    samples: Sequence[Any] = cast(Mapping[str, Any], contender["samples"])[stage]
    seconds = [median(each) if isinstance(each, list) else each for each in samples if each != []]
    # A time of zero has no ratio; clocks do not show one for work of this size.
    plain = np.log(np.asarray(seconds, float)) if min(seconds, default=0) > 0 else np.zeros(0)
    paired = min(len(plain), len(control))
    return _Rounds(plain, plain[:paired] - control[:paired])


def _enough(rounds: Sequence[_Rounds]) -> bool:
    return all(len(each.controlled) >= MIN_ROUNDS for each in rounds)


def _time(
    before: ContenderReport,
    after: ContenderReport,
    stage: str,
    rounds: Sequence[_Rounds],
    error: float,
) -> Change:
    old, new = (math.exp(median(each.plain.tolist())) for each in rounds)
    if not _enough(rounds):
        ratio = new / old
        return _change(before, after, stage, (old, new), (ratio, ratio, ratio), "undecided", "too few rounds")
    (first, second), plain = (_trimmed(each.controlled) for each in rounds), [_trimmed(each.plain) for each in rounds]
    center, raw = second.mean - first.mean, plain[1].mean - plain[0].mean
    square = first.square + second.square
    # Welch and Satterthwaite's degrees of freedom, rounded down.
    parts = first.square**2 / first.freedom + second.square**2 / second.freedom
    half = _student(1 - error / 2, int(square**2 / parts)) * math.sqrt(square) if parts else 0.0
    ratio, low, high = (math.exp(value) for value in (center, center - half, center + half))
    verdict: Verdict = "unchanged"
    if low > 1 and min(center, raw) > math.log1p(FLOOR):
        verdict = "regression"
    elif high < 1 and max(center, raw) < -math.log1p(FLOOR):
        verdict = "improvement"
    why = f"{_text(stage, old)} before, {_text(stage, new)} now, {ratio:.3f} [{low:.3f}, {high:.3f}] after the control"
    return _change(before, after, stage, (old, new), (ratio, low, high), verdict, why)


def _memory(before: ContenderReport, after: ContenderReport) -> Change | None:
    memories = before["memory"], after["memory"]
    if memories[0] is None or memories[1] is None or not memories[0]["peak_rss_bytes"]:
        return None
    device = [memory["device_peak_bytes"] for memory in memories if memory is not None]
    old, new = memories[0]["peak_rss_bytes"], memories[1]["peak_rss_bytes"]
    if device[0] and device[1] and abs(device[1] / device[0] - 1) > abs(new / old - 1):
        old, new = device[0], device[1]  # on a GPU, the one of the two that changed more
    ratio, verdict = new / old, "unchanged"
    if abs(new - old) > MEMORY_BYTES and abs(math.log(ratio) if ratio else math.inf) > math.log1p(MEMORY_FLOOR):
        verdict = "regression" if new > old else "improvement"
    why = f"{_text('memory', old)} before, {_text('memory', new)} now, {ratio:.3f} times"
    return _change(before, after, "memory", (old, new), (ratio, ratio, ratio), verdict, why)


def _quality(before: ContenderReport, after: ContenderReport) -> Change | None:
    if before["quality"] is None or after["quality"] is None:
        return None
    if before["quality"]["reference"] != after["quality"]["reference"]:
        return None
    old, new = before["quality"]["psnr"], after["quality"]["psnr"]
    drop, verdict = min(old, PSNR_EQUAL) - min(new, PSNR_EQUAL), "unchanged"
    if abs(drop) > PSNR_FLOOR:
        verdict = "regression" if drop > 0 else "improvement"
    why = f"{old:.1f} dB before, {new:.1f} dB now"
    return _change(before, after, "psnr", (old, new), (1.0, 1.0, 1.0), verdict, why)


def _lost(before: ContenderReport, after: ContenderReport) -> Change | None:
    """A contender that drew images and now draws none because it fails."""
    if not before["samples"]["total"] or after["samples"]["total"] or after["state"] != "failed":
        return None
    rounds = len(before["samples"]["total"])
    why = f"it drew images before, now it fails: {after['reason']}"
    return _change(before, after, "state", (rounds, 0), (1.0, 1.0, 1.0), "regression", why)


def _change(
    before: ContenderReport,
    after: ContenderReport,
    figure: str,
    values: tuple[float, float],
    ratio: tuple[float, float, float],
    verdict: Any,
    why: str,
) -> Change:
    return Change(after["name"], after["label"], after["kind"], figure, *values, *ratio, verdict, why)


def _pairs(old: Report, new: Report) -> Iterator[tuple[ContenderReport, ContenderReport]]:
    later = {contender["name"]: contender for contender in new["contenders"]}
    for before in old["contenders"]:
        if before["name"] in later:
            yield before, later[before["name"]]


def _check_same_job(old: Report, new: Report) -> None:
    for name in ("job", "model"):
        before, after = _part(old, name), _part(new, name)
        for key in before:
            # Knowledge of a model's training may change without the model.
            if before[key] != after[key] and key != "trained":
                raise ReportError(
                    f"the reports are of different jobs: {name}.{key} was {_short(before[key])} and is "
                    f"{_short(after[key])}; measure the same job to compare"
                )


def _warnings(old: Report, new: Report) -> Iterator[str]:
    for place, keys in (
        ("machine", ("processor", "cpus", "memory_bytes", "system", "governor", "instructions", "gpus")),
        ("method", ("residency", "warm_up")),
    ):
        before, after = _part(old, place), _part(new, place)
        for key in keys:
            if before[key] != after[key]:
                yield f"another {place}: {key} was {_short(before[key])} and is {_short(after[key])}"
    for name, report in (("old", old), ("new", new)):
        if not report["complete"]:
            yield f"the {name} report is not complete: {report['missing'][0]}"
    later = {contender["name"]: contender for contender in new["contenders"]}
    for contender in old["contenders"]:
        if not contender["samples"]["total"]:
            continue
        found = later.get(contender["name"])
        if found is None:
            yield f"{contender['label']} is not in the new report"
        elif not found["samples"]["total"] and found["state"] != "failed":
            yield f"{contender['label']} has no figures in the new report: {found['reason']}"
        elif changed := [
            f"{package} {contender['versions'].get(package, 'none')} to {found['versions'].get(package, 'none')}"
            for package in sorted({*contender["versions"], *found["versions"]})
            if contender["versions"].get(package) != found["versions"].get(package)
        ]:
            yield f"{contender['label']} has other versions: {', '.join(changed)}"


def _part(report: Report, name: str) -> Mapping[str, Any]:
    return cast(Mapping[str, Mapping[str, Any]], report)[name]


def _text(figure: str, value: float) -> str:
    if figure == "memory":
        return figures.size(value)
    if figure == "psnr":
        return f"{value:.1f} dB"
    return f"{value:.0f} rounds" if figure == "state" else figures.seconds(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
