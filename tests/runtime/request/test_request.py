"""A request compiles its sampler's plan, and knows at which steps it is guided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.request.request import Request
from latentrt.runtime.samplers import compile_plan

SCHEDULER = {"_class_name": "EulerDiscreteScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def request(sampler: str = "euler", guidance: float = 5.0, **options: Any) -> Request:
    return Request("p", "", 4, guidance, 7, sampler, 48, 32, 1, 0, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True] * 4),
        ({"guidance": 1.0}, [False] * 4),
        ({"classifier_free": False}, [False] * 4),
        ({"guidance_start": 0.25, "guidance_end": 0.75}, [False, True, True, False]),
        ({"guidance_end": 0.3}, [True, True, False, False]),
    ],
)
def test_guidance_has_its_part_of_the_run(options: dict[str, Any], expected: list[bool]) -> None:
    """A scale of 1, or a model without two predictions, is not guided anywhere."""
    asked = request(**options)
    assert [asked.guided_at(index, 4) for index in range(4)] == expected
    assert asked.guided == any(expected)


def test_steps_are_the_samplers() -> None:
    """The plan is that of the sampler with the request's number of steps."""
    plan, expected = request().compile_plan(SCHEDULER), compile_plan("euler", SCHEDULER, 4)
    np.testing.assert_array_equal(plan.timesteps, expected.timesteps)
    np.testing.assert_array_equal(plan.update, expected.update)


def test_levels_of_the_request_go_before_those_of_the_family() -> None:
    """Timesteps or noise levels take the place of the number of steps; a family's count where there are none."""
    own = request(timesteps=(900.0, 500.0, 100.0))
    assert own.compile_plan(SCHEDULER, sigmas=[1.0, 0.5]).timesteps.tolist() == [900, 500, 100]
    flow = request("flow-euler", sigmas=(1.0, 0.25))
    assert flow.compile_plan(FLOW, sigmas=[1.0, 0.5, 0.1]).timesteps.tolist() == [1000, 250]
    without = request("flow-euler")
    np.testing.assert_allclose(without.compile_plan(FLOW, sigmas=[1.0, 0.5, 0.1]).timesteps, [1000, 500, 100])


def test_a_strength_leaves_steps_out() -> None:
    """The last of the steps are those of the whole plan."""
    whole = request().compile_plan(SCHEDULER)
    rest = request().compile_plan(SCHEDULER, skipped_steps=1)
    assert rest.timesteps.tolist() == whole.timesteps.tolist()[1:]


def test_what_a_sampler_cannot_do_is_refused() -> None:
    """The sentence names the option."""
    with pytest.raises(InvalidRequestError, match="eta"):
        request(eta=0.5).compile_plan(SCHEDULER)
