"""A measured time under the roofline: the rate that was reached, beside the highest that the machine allows.

The roofline is the lesser of the arithmetic's ceiling, and of operations a byte times the memory's (Williams, Waterman
and Patterson 2009, "Roofline: an insightful visual performance model for multicore architectures").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentrt.engines.errors import InvalidRequestError

from .counting import Work

COMPUTED_IN: Mapping[str, str] = {"fp16": "fp32", "int8-weights": "fp32"}
"""Precisions of a form whose products a CPU computes in another: ONNX Runtime and OpenVINO widen half precision, and
weights that are quantised without their activations."""


@dataclass(frozen=True)
class RooflineRow:
    """The place of a stage under the roofline.

    Attributes:
        stage: The stage's name.
        flops: Floating-point operations.
        bytes: Bytes that must be moved.
        seconds: Measured time.
        calls: Calls of the engine in that time.
        achieved_flops: Operations a second that were reached.
        ceiling_flops: Most operations a second that the machine allows for as many operations a byte.
        percent: The rate reached, in percent of the ceiling. Convolutions by Winograd's algorithm can exceed 100, as
            can a graph whose form is int8 and which keeps half its products in fp32.
        bound: The limit that sets the ceiling: ``"compute"`` or ``"memory"``.
        precision: The precision whose ceiling it is.
    """

    stage: str
    flops: int
    bytes: int
    seconds: float
    calls: int
    achieved_flops: float
    ceiling_flops: float
    percent: float
    bound: str
    precision: str


def place(
    work: Work, seconds: float, ceilings: Mapping[str, Any], precision: str, *, stage: str = "", calls: int = 1
) -> RooflineRow:
    """Put a measured time under the roofline.

    Args:
        work: The work that was done in that time.
        seconds: The time.
        ceilings: The result of :func:`latentrt.benchmarks.roofline.ceilings.measure_ceilings`.
        precision: Precision of the products; :data:`COMPUTED_IN` replaces some by another.
        stage: Name of the stage that was timed.
        calls: Calls of the engine in that time.

    Raises:
        InvalidRequestError: if there is no ceiling for the precision, or no work or time.
    """
    computed_in = COMPUTED_IN.get(precision, precision)
    matmul = ceilings["matmul"].get(computed_in, {"unavailable": f"no ceiling was measured for {computed_in}"})
    if "unavailable" in matmul:
        raise InvalidRequestError(f"{stage or 'the work'} has no place under the roofline: {matmul['unavailable']}")
    if not (seconds > 0 and math.isfinite(seconds) and work.flops > 0 and work.bytes > 0):
        raise InvalidRequestError(
            f"{stage or 'the work'} has no place under the roofline: {work.flops} operations and {work.bytes} bytes in "
            f"{seconds} seconds"
        )
    peak, from_memory = matmul["flops_per_second"], work.flops / work.bytes * ceilings["copy"]["bytes_per_second"]
    ceiling, achieved = min(peak, from_memory), work.flops / seconds
    return RooflineRow(
        stage=stage,
        flops=work.flops,
        bytes=work.bytes,
        seconds=seconds,
        calls=calls,
        achieved_flops=achieved,
        ceiling_flops=ceiling,
        percent=100 * achieved / ceiling,
        bound="compute" if ceiling == peak else "memory",
        precision=computed_in,
    )
