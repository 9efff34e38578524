"""Medians with intervals, from raw samples.

Intervals are bootstrap percentile intervals of the median (Efron and Tibshirani 1993, "An Introduction to the
Bootstrap", chapter 13). They say how well the run's own samples determine the median. They leave out what differs
between runs (another program, another temperature), so reports keep the control's samples too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from .report.types import Interval, Summary

CONFIDENCE = 0.95
"""Share of intervals that contain the true median."""

RESAMPLES = 2000
"""Number of bootstrap samples that are drawn for an interval."""

_SEED = 0


def median_interval(rounds: Sequence[Sequence[float]]) -> Interval:
    """The median of all samples and its interval; whole rounds are resampled, since samples within one are alike.

    Args:
        rounds: Samples of each round, in any unit; at least one sample in all. Rounds may differ in length.
    """
    groups = [np.asarray(group, np.float64) for group in rounds if len(group)]
    table = np.full((len(groups), max(map(len, groups))), np.nan)
    for row, group in zip(table, groups, strict=True):
        row[: len(group)] = group
    drawn = np.random.default_rng(_SEED).integers(0, len(groups), (RESAMPLES, len(groups)))
    samples = table[drawn].reshape(RESAMPLES, -1)
    medians = np.nanmedian(samples, axis=1) if np.isnan(table).any() else np.median(samples, axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"median": float(np.median(np.concatenate(groups))), "low": float(low), "high": float(high)}


def single_interval(samples: Iterable[float]) -> Interval:
    """:func:`median_interval` of samples of which each is a round of its own."""
    return median_interval([[sample] for sample in samples])


def summarize(rounds: Sequence[Sequence[float]]) -> Summary:
    """Median, interval, percentiles and coefficient of variation of seconds, grouped by round."""
    samples = np.concatenate([np.asarray(group, np.float64) for group in rounds if len(group)])
    p50, p90, p99 = (float(value) for value in np.quantile(samples, [0.5, 0.9, 0.99]))
    interval = median_interval(rounds)
    return {
        "median": interval["median"],
        "low": interval["low"],
        "high": interval["high"],
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "cv": variation(samples),
        "count": len(samples),
    }


def variation(samples: Sequence[float] | NDArray[np.float64]) -> float:
    """Coefficient of variation: standard deviation over mean; 0 of a single sample."""
    values = np.asarray(samples, np.float64)
    return float(values.std(ddof=1) / values.mean()) if len(values) > 1 else 0.0
