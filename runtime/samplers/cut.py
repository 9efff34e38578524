"""Rows of a plan that belong to a part of a run, such as a base model's share or its refiner's."""

from __future__ import annotations

from typing import Any

import numpy as np

from latentrt.engines.checks import is_number, show
from latentrt.engines.errors import InvalidRequestError

from .plan import Plan


def check_part(start: Any, end: Any) -> tuple[float | None, float | None]:
    """Check the two ends of a part: fractions of the trained timesteps, counted from pure noise.

    Raises:
        InvalidRequestError: if one is not between 0 and 1, or nothing is between them.
    """
    found: list[float | None] = []
    for name, value in (("denoising_start", start), ("denoising_end", end)):
        if value is not None and not (is_number(value) and 0 < value < 1):
            raise InvalidRequestError(f"{name} is {show(value)}, expected a number between 0 and 1, or nothing")
        found.append(None if value is None else float(value))
    first, last = found
    if first is not None and last is not None and first >= last:
        raise InvalidRequestError(f"denoising_start is {first:g}, expected less than denoising_end, which is {last:g}")
    return first, last


def row_after(plan: Plan, fraction: float, train_timesteps: int) -> int:
    """The first row of a plan whose step begins after a fraction of the trained timesteps.

    Timesteps are counted as diffusers' pipelines of SDXL do. A step is never cut in two: where those stop between the
    calls of a sampler of second order, and begin that step again from the first call's result, all of its rows belong
    to the part in which it begins.

    Args:
        plan: Plan of the whole run.
        fraction: From 0, pure noise, to 1.
        train_timesteps: Number of timesteps that the model was trained with.

    Returns:
        The row, or their number.
    """
    limit = round(train_timesteps - fraction * train_timesteps)
    # In float32, as the timesteps that diffusers compares.
    row = int(np.count_nonzero(plan.timesteps.astype(np.float32) >= limit))
    while row in plan.within:
        row += 1
    return row


def rows_of_part(
    plan: Plan, start: float | None, end: float | None, train_timesteps: int, sampler: str
) -> tuple[int, int]:
    """First row of a part of a run, and the row before which it ends.

    Args:
        plan: Plan of the whole run.
        start: Fraction at which the part begins; ``None`` is the run's start.
        end: Fraction at which it ends; ``None`` is the run's end.
        train_timesteps: Number of timesteps that the model was trained with.
        sampler: Name of the sampler, for messages.

    Raises:
        InvalidRequestError: if no step begins between the two.
    """
    first = 0 if start is None else row_after(plan, start, train_timesteps)
    last = len(plan) if end is None else row_after(plan, end, train_timesteps)
    if first >= last:
        steps, given = len(plan) - len(plan.within), []
        if start is not None:
            given.append(f"after denoising_start {start:g}")
        if end is not None:
            given.append(f"before denoising_end {end:g}")
        raise InvalidRequestError(
            f"none of the {steps} steps of {sampler} begins {' and '.join(given)}: use more steps, or other fractions"
        )
    return first, last


def row_after_skipped(plan: Plan, skipped_steps: int, sampler: str) -> int:
    """The first row of a run that leaves steps out, so as to change an image that is there.

    Steps are counted as diffusers' pipelines do it. They take the repeated call of ``pndm`` for a step.

    Args:
        plan: Plan of the whole run.
        skipped_steps: Steps to leave out.
        sampler: Name of the sampler.

    Raises:
        InvalidRequestError: if no step would be left.
    """
    begins = [row for row in range(len(plan)) if row not in plan.within]
    if sampler == "pndm":
        begins = [next((begin for begin in begins if begin >= row), len(plan)) for row in range(len(plan))]
    if skipped_steps >= len(begins) or begins[skipped_steps] >= len(plan):
        raise InvalidRequestError(
            f"none of the {len(plan) - len(plan.within)} steps of {sampler} would be taken: use more steps, or a "
            "higher strength"
        )
    return begins[skipped_steps]


def steps_before(plan: Plan, row: int) -> int:
    """Steps that a plan takes before a row that begins one."""
    return row - sum(1 for within in plan.within if within < row)
