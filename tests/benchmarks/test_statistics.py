"""Medians and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from latentrt.benchmarks.statistics import CONFIDENCE, median_interval, summarize, variation


def test_intervals_hold_the_true_median() -> None:
    """Of intervals of normal samples about as many hold the median as they claim; equal samples have none."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        interval = median_interval([[value] for value in generator.normal(10, 1, 21)])
        held += interval["low"] <= 10 <= interval["high"]
    assert abs(held / 200 - CONFIDENCE) < 0.05
    assert summarize([[2.0, 2.0], [2.0]]) == {
        **dict.fromkeys(("median", "low", "high", "p50", "p90", "p99"), 2.0),
        "cv": 0.0,
        "count": 3,
    }


def test_rounds_are_drawn_whole() -> None:
    """Samples that are alike within a round say less than as many independent ones."""
    generator = np.random.default_rng(2)
    levels = generator.normal(10, 1, 8)
    alike = [[level] * 25 for level in levels]
    apart = [[value] for value in np.repeat(levels, 25) + generator.normal(0, 1e-6, 200)]

    def width(rounds: list[list[float]]) -> float:
        interval = median_interval(rounds)
        return interval["high"] - interval["low"]

    assert width(alike) > 3 * width(apart)
    assert variation([3.0]) == 0
    assert variation([1.0, 3.0]) == pytest.approx(np.std([1, 3], ddof=1) / 2)
