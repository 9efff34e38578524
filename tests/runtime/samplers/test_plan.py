"""Execution of plans, whatever sampler they came from."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.samplers import SAMPLERS, Plan, compile_plan, run_plan, step

# Its keys are not read by flow and EDM samplers.
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def random_plan(registers: int, rows: int = 3) -> Plan:
    random = np.random.default_rng(0)
    return Plan(
        timesteps=np.arange(rows, 0, -1.0),
        input_scale=random.uniform(0.1, 1, rows),
        update=random.normal(size=(rows, registers, registers + 2)),
        uses_noise=np.ones(rows, dtype=bool),
        init_scale=2.0,
    )


@pytest.mark.parametrize("registers", [1, 2, 5])
def test_step_is_the_matrix_product_of_the_plan(registers: int) -> None:
    """A step multiplies registers, output and noise with its row's matrix, and changes none of them."""
    plan, random = random_plan(registers), np.random.default_rng(1)
    state = random.normal(size=(registers, 2, 4, 3, 5)).astype(np.float32)
    output, noise = random.normal(size=(2, 2, 4, 3, 5)).astype(np.float32)
    before = state.copy(), output.copy(), noise.copy()
    expected = np.einsum("rk,k...->r...", plan.update[1], np.stack([*state, output, noise]).astype(np.float64))
    np.testing.assert_allclose(step(plan, 1, state, output, noise), expected, rtol=1e-5, atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip((state, output, noise), before, strict=True))


def test_run_plan_scales_inputs_and_passes_timesteps_and_noise_in_order() -> None:
    """The model sees scaled latents and float timesteps; noise is drawn once for each row that uses it."""
    plan = dataclasses.replace(
        random_plan(2), uses_noise=np.array([True, False, True]), update=random_plan(2).update.copy()
    )
    seen: list[float] = []
    draws: list[int] = []
    noise = np.random.default_rng(2).normal(size=(1, 2, 3, 3)).astype(np.float32)

    def model(x: np.ndarray, t: float) -> np.ndarray:
        assert isinstance(t, float)
        if not seen:
            np.testing.assert_allclose(x, noise * 2.0 * plan.input_scale[0], rtol=1e-6)
        seen.append(t)
        return np.sin(x)

    def source() -> np.ndarray:
        draws.append(len(seen))
        return noise

    latents = run_plan(plan, noise, model, source)
    assert seen == [3.0, 2.0, 1.0]
    assert draws == [1, 3]
    assert latents.shape == noise.shape
    assert latents.dtype == np.float32


def test_missing_noise_is_refused_before_the_model_runs() -> None:
    """A plan that draws cannot run without a source."""
    plan, noise = random_plan(1), np.zeros((1, 1, 2, 2), np.float32)
    with pytest.raises(InvalidRequestError, match="noise_source"):
        run_plan(plan, noise, lambda x, t: pytest.fail("model was called"))
    with pytest.raises(InvalidRequestError, match="needs noise"):
        step(plan, 0, plan.start(noise), noise)


def test_registers_of_another_shape_are_refused() -> None:
    """Registers that do not fit plan and output are named with both shapes."""
    plan = random_plan(2)
    with pytest.raises(InvalidRequestError, match=r"\(1, 1, 4, 2, 2\), expected \(2, 1, 4, 2, 2\)"):
        step(plan, 0, np.zeros((1, 1, 4, 2, 2), np.float32), np.zeros((1, 4, 2, 2), np.float32))


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": np.zeros(0)},
        {"input_scale": np.ones(2)},
        {"update": np.zeros((3, 1, 2))},
        {"update": np.zeros((3, 1, 3), np.float32)},
        {"update": np.full((3, 1, 3), np.nan)},
        {"init_scale": np.inf},
    ],
)
def test_a_plan_of_wrong_shapes_or_values_is_refused(change: dict[str, object]) -> None:
    """A plan is checked when it is made."""
    with pytest.raises(InvalidRequestError):
        dataclasses.replace(random_plan(1), **change)


def test_a_plan_cannot_be_changed() -> None:
    """Plans are shared between threads, so their arrays are read-only."""
    plan = compile_plan("euler", CONFIG, 4)
    with pytest.raises(ValueError, match="read-only"):
        plan.update[0, 0, 0] = 1.0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_of_stable_diffusion_latents_takes_under_a_millisecond(sampler: str) -> None:
    """Host time of a step at 4x64x64 latents is under 1 ms (best of many: the machine may be busy)."""
    plan = compile_plan(sampler, CONFIG, 8)
    noise = np.random.default_rng(0).normal(size=(1, 4, 64, 64)).astype(np.float32)
    registers, i = plan.start(noise), len(plan) - 2
    times = []
    for _ in range(200):
        start = time.perf_counter()
        step(plan, i, registers, noise, noise)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3
