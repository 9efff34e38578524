"""Figures of a report for people: time of an image, ratio to the reference, and their texts.

Markdown, page and README use this module, so that all three say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .types import Ceilings, ContenderReport, Interval, Report


@dataclass(frozen=True)
class Figure:
    """A median and its interval.

    Attributes:
        median: The figure.
        low: Lower end of its interval.
        high: Upper end.
        steps: Steps that the figure was extrapolated to; ``None`` for a measured figure.
    """

    median: float
    low: float
    high: float
    steps: int | None = None

    @property
    def extrapolated(self) -> bool:
        """Whether the figure was estimated from fewer steps."""
        return self.steps is not None

    @property
    def spread(self) -> bool:
        """Whether the figure has an interval; a single sample has none."""
        return self.low < self.high


def ordered(report: Report) -> list[ContenderReport]:
    """All contenders, fastest image first; those without an image come last, in the report's order."""
    times = [image(contender) for contender in report["contenders"]]
    keys = [math.inf if time is None else time.median for time in times]
    return [report["contenders"][index] for index in sorted(range(len(keys)), key=keys.__getitem__)]


def reference(report: Report) -> ContenderReport | None:
    """The contender that the others are compared with; ``None`` where there is none."""
    name = report["reference"]["contender"] if report["reference"] is not None else None
    return next((contender for contender in report["contenders"] if contender["name"] == name), None)


def measured_text(report: Report, contender: ContenderReport) -> str:
    """The number of steps that were timed, as text, e.g. ``3 steps``."""
    steps = contender["samples"]["step"]
    count = len(steps[0]) if steps and steps[0] else report["job"]["steps"]
    return "1 step" if count == 1 else f"{count} steps"


def image(contender: ContenderReport) -> Figure | None:
    """Seconds from prompt to pixels: the extrapolated figure where there is one, else the measured one."""
    if (extrapolated := contender["extrapolated"]) is not None:
        return _figure(extrapolated["seconds"], extrapolated["steps"])
    return _figure(contender["summary"]["total"]) if "total" in contender["summary"] else None


def step(contender: ContenderReport) -> Figure | None:
    """Seconds of a step; ``None`` if none was measured."""
    return _figure(contender["summary"]["step"]) if "step" in contender["summary"] else None


def decode(contender: ContenderReport) -> Figure | None:
    """Seconds of the VAE's decoder; ``None`` if it was not measured."""
    return _figure(contender["summary"]["vae_decoder"]) if "vae_decoder" in contender["summary"] else None


def image_ratio(report: Report, contender: ContenderReport) -> Figure | None:
    """How many times as fast as the reference a contender draws an image.

    For measured images this is the report's own ratio, computed in pairs. For extrapolated ones it is the quotient of
    the two extrapolated medians, and its interval is the widest that the two intervals allow.
    """
    other = reference(report)
    mine, theirs = image(contender), image(other) if other is not None else None
    if mine is None or theirs is None or mine.median <= 0 or mine.low <= 0:
        return None
    if not (mine.extrapolated or theirs.extrapolated):
        return _figure(contender["ratios"]["total"]) if "total" in contender["ratios"] else None
    ratio = theirs.median / mine.median
    if contender is other:
        return Figure(1.0, 1.0, 1.0, mine.steps)
    return Figure(ratio, theirs.low / mine.high, theirs.high / mine.low, mine.steps or theirs.steps)


def rates(ceilings: Ceilings) -> dict[str, float]:
    """Operations a second of products of matrices, for each precision that was measured."""
    return {
        precision: entry["flops_per_second"]
        for precision, entry in ceilings["matmul"].items()
        if "flops_per_second" in entry
    }


def image_title(report: Report) -> str:
    """The title of the times of :func:`image`, e.g. ``image`` or ``image of 20 steps``."""
    images = report["job"]["images"]
    title = "image" if images == 1 else f"{images} images"
    steps = {contender["extrapolated"]["steps"] for contender in report["contenders"] if contender["extrapolated"]}
    return f"{title} of {steps.pop()} steps" if len(steps) == 1 else title


def significant(value: float, digits: int = 3) -> str:
    """A number with some significant digits and no exponent, e.g. ``0.0412``, ``4.12``, ``412``, ``4123``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    # Rounding may have carried into one more digit: 0.9996 is 1.00, not 1.000.
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(float(text)))))}f}" if float(text) else text


@dataclass(frozen=True)
class Unit:
    """The unit of all times in a column or a plot, so that they can be compared by eye.

    Attributes:
        name: The unit's symbol.
        factor: Number of these units in a second.
    """

    name: str
    factor: float

    def text(self, value: float, digits: int = 3) -> str:
        """A time in this unit, without the symbol."""
        return significant(value * self.factor, digits)

    def interval(self, figure: Figure) -> str:
        """The interval of a figure, e.g. ``[40.1, 42.0]``; empty if it has none."""
        return f"[{self.text(figure.low)}, {self.text(figure.high)}]" if figure.spread else ""


def unit_for(figures: Iterable[Figure | None]) -> Unit:
    """Milliseconds if most figures are below half a second, else seconds."""
    medians = sorted(figure.median for figure in figures if figure is not None)
    return Unit("ms", 1e3) if medians and medians[len(medians) // 2] < 0.5 else Unit("s", 1.0)


def seconds(value: float | None, missing: str = "-") -> str:
    """A duration with its unit, e.g. ``12.3 ms``, ``4.56 s`` or ``12.3 min``."""
    if value is None:
        return missing
    if value < 1:
        return f"{significant(value * 1e3)} ms"
    return f"{significant(value)} s" if value < 600 else f"{significant(value / 60)} min"


def size(count: float | None, missing: str = "-") -> str:
    """Bytes in decimal units, e.g. ``43.7 MB``."""
    if count is None:
        return missing
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{significant(count)} {unit}"
        count /= 1000
    return f"{significant(count)} GB"


def rate(value: float, unit: str = "FLOP/s") -> str:
    """A rate, e.g. ``131 GFLOP/s``."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{significant(value)} {prefix}{unit}"
        value /= 1000
    return f"{significant(value)} T{unit}"


def count(value: int) -> str:
    """A number of parameters, e.g. ``860 million``."""
    for name, factor in (("billion", 1e9), ("million", 1e6)):
        if value >= factor:
            return f"{significant(value / factor)} {name}"
    return str(value)


def job_text(report: Report) -> str:
    """The request of the job, in a line."""
    job = report["job"]
    images = "an image" if job["images"] == 1 else f"{job['images']} images at once"
    threads = "the libraries' own number of threads" if job["threads"] == 0 else f"{job['threads']} threads"
    steps = "1 step" if job["steps"] == 1 else f"{job['steps']} steps"
    return (
        f"{images} of {job['width']}x{job['height']}, {steps} of {job['sampler']}, "
        f"guidance {job['guidance']:g}, {threads}, {job['device']}"
    )


def machine_text(report: Report) -> str:
    """The machine, in a line."""
    machine = report["machine"]
    cpus = "1 CPU" if machine["cpus"] == 1 else f"{machine['cpus']} CPUs"
    return ", ".join([machine["processor"], cpus, f"{size(machine['memory_bytes'])} of memory", *machine["gpus"]])


def weights_text(report: Report) -> str:
    """The origin of the model's weights; empty where the report does not know it."""
    trained = report["model"]["trained"]
    return "" if trained is None else "trained weights" if trained else "random weights"


def noise_text(report: Report) -> str:
    """How steady the machine was, in a sentence."""
    control = report["control"]
    if control["cv"] is None:
        return "How steady the machine was is unknown: the control ran fewer than two times."
    return f"The control, {control['what']}, varied by {100 * control['cv']:.1f} % (coefficient of variation)."


def extrapolation_text(report: Report, contender: ContenderReport) -> str:
    """How an image's time was extrapolated; empty for a measured one."""
    extrapolated = contender["extrapolated"]
    if extrapolated is None:
        return ""
    return f"{extrapolated['steps']} steps, extrapolated from {measured_text(report, contender)}"


def _figure(interval: Interval, steps: int | None = None) -> Figure:
    return Figure(interval["median"], interval["low"], interval["high"], steps)
