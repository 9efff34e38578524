"""The outcome of a check, and the measures that decide it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from latentrt.engines import Array


class Skipped(Exception):  # noqa: N818  # no error
    """Raised by a check that does not apply here; the message says why."""


@dataclass
class Check:
    """The outcome of one check.

    Attributes:
        name: The check's name.
        status: ``"pass"``, ``"fail"`` or ``"skipped"``.
        detail: One line for people: figures, or the reason.
        samples: Raw figures by name; times are in seconds.
    """

    name: str
    status: str = "pass"
    detail: str = ""
    samples: dict[str, Any] = field(default_factory=dict)

    def require(self, condition: bool, otherwise: str) -> None:
        """Fail the check unless ``condition`` holds.

        Raises:
            AssertionError: with the message ``otherwise``.
        """
        if not condition:
            raise AssertionError(otherwise)


def psnr(reference: Array, received: Array, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB: infinite for equal arrays, minus infinity where one is not finite.

    Args:
        reference: The expected array.
        received: An array of the same shape.
        peak: The largest possible value; the reference's largest magnitude if left out.
    """
    wanted, got = reference.astype(np.float64), received.astype(np.float64)
    error = float(np.mean(np.square(wanted - got)))
    if error == 0:
        return math.inf
    peak = peak or float(np.abs(wanted).max())
    return 10 * math.log10(peak * peak / error) if peak and math.isfinite(error) else -math.inf


def as_json(value: float) -> float | str:
    """A number as JSON can hold it: text where it is not finite."""
    return value if math.isfinite(value) else str(value)


def equal(left: Mapping[str, Array], right: Mapping[str, Array]) -> bool:
    """Whether two sets of outputs agree to the last bit."""
    return all(np.array_equal(left[name], right[name]) for name in left)


def milliseconds(seconds: Sequence[float]) -> str:
    """The median of some times, in milliseconds."""
    return f"{1e3 * median(seconds):.2f} ms"
