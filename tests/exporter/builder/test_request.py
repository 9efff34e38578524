"""A request of a build is checked when it is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.engines.errors import (
    InvalidRequestError,
)
from latentrt.engines.trt import Range
from latentrt.exporter.builder.request import BuildRequest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engines": ()}, "no engine"),
        ({"engines": ("openvinyl",)}, "unknown engine"),
        ({"precision": "fp12"}, "unknown precision"),
        ({"sampler": "magic"}, "unknown sampler"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10_001}, "steps is 10001"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"ranges": {"depth": Range.fixed(1)}}, "unknown profile entry 'depth'"),
        ({"ranges": {"batch": Range(1, 1, 10**6)}}, "exceeds 4096"),
        ({"ranges": {"height": Range.fixed(10**6)}}, "exceeds 16384"),
        ({"precision": "int8", "calibration": None, "verify": False}, "int8 learns its ranges from images"),
        ({"precision": "fp16", "engines": ["tensorrt-rtx"], "calibration": None}, "no images are drawn"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    """A request is checked when it is made."""
    with pytest.raises(InvalidRequestError, match=message):
        BuildRequest(tmp_path, tmp_path / "bundle", **arguments)  # type: ignore[arg-type]
