"""Measured times under the roofline: which ceiling holds, and what has no place."""

from __future__ import annotations

import pytest

from latentrt.benchmarks.roofline.counting import Work
from latentrt.benchmarks.roofline.placing import place
from latentrt.engines.errors import InvalidRequestError

CEILINGS = {
    "threads": 2,
    "matmul": {
        "fp32": {"flops_per_second": 1e11},
        "bf16": {"unavailable": "no instructions"},
        "int8": {"flops_per_second": 4e11},
    },
    "copy": {"bytes_per_second": 1e10},
}


@pytest.mark.parametrize(
    ("precision", "intensity", "ceiling", "bound"),
    [
        ("fp32", 100, 1e11, "compute"),
        ("fp32", 10, 1e11, "compute"),
        ("fp32", 2, 2e10, "memory"),
        ("int8", 20, 2e11, "memory"),
        ("int8", 100, 4e11, "compute"),
        ("fp16", 100, 1e11, "compute"),
        ("int8-weights", 100, 1e11, "compute"),
    ],
)
def test_a_time_has_a_place_under_the_roofline(precision: str, intensity: int, ceiling: float, bound: str) -> None:
    """The ceiling is arithmetic's or the memory's, whichever is lower at so many operations a byte."""
    work = Work(intensity * 10**9, 10**9, {}, 0)
    row = place(work, 2.0, CEILINGS, precision, stage="step", calls=3)
    assert (row.stage, row.calls, row.flops, row.bytes, row.seconds) == ("step", 3, work.flops, work.bytes, 2.0)
    assert row.achieved_flops == intensity * 0.5e9
    assert (row.ceiling_flops, row.bound) == (ceiling, bound)
    assert row.percent == pytest.approx(100 * row.achieved_flops / ceiling)
    assert row.precision == {"fp16": "fp32", "int8-weights": "fp32"}.get(precision, precision)


@pytest.mark.parametrize(
    ("precision", "seconds", "message"),
    [
        ("bf16", 1.0, "no instructions"),
        ("fp8", 1.0, "no ceiling was measured for fp8"),
        ("fp32", 0.0, "in 0.0 seconds"),
    ],
)
def test_what_has_no_place_is_refused(precision: str, seconds: float, message: str) -> None:
    """A precision without a ceiling, and no time at all."""
    with pytest.raises(InvalidRequestError, match=message):
        place(Work(10, 10, {}, 10), seconds, CEILINGS, precision, stage="step")
