"""Noise schedules, and the ``beta`` quantiles beneath them, are those of diffusers and scipy."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt.runtime.samplers.beta import beta_quantile
from latentrt.runtime.samplers.config import Config
from latentrt.runtime.samplers.schedule import noise_schedule, sigma_to_timestep, spaced_timesteps

CONFIGS: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "scaled_linear", "num_train_timesteps": 777},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.01] * 40, "num_train_timesteps": 40},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_alphas_are_diffusers_to_the_last_bit(config: dict[str, Any]) -> None:
    """Cumulative products equal diffusers' bit for bit, for timesteps are truncated on what follows from them."""
    ours = noise_schedule(Config.parse(config)).alphas_cumprod
    np.testing.assert_array_equal(ours, diffusers.EulerDiscreteScheduler(**config).alphas_cumprod.numpy())


@pytest.mark.parametrize("kind", ["sigmoid", "laplace"])
def test_the_rarer_schedules_are_diffusers(kind: str) -> None:
    """Schedules that only DDPM knows in diffusers agree with it."""
    ours = noise_schedule(Config.parse({"beta_schedule": kind})).alphas_cumprod
    np.testing.assert_allclose(ours, diffusers.DDPMScheduler(beta_schedule=kind).alphas_cumprod.numpy(), rtol=1e-4)


def test_the_exponential_schedule_is_diffusers() -> None:
    """The schedule that only Heun knows in diffusers agrees with it."""
    ours = noise_schedule(Config.parse({"beta_schedule": "exp"})).alphas_cumprod
    theirs = diffusers.HeunDiscreteScheduler(beta_schedule="exp").alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    """The last alpha_bar is zero, or the floor that keeps its noise level finite; the first stays."""
    plain = noise_schedule(Config.parse({})).alphas_cumprod
    config = Config.parse({"rescale_betas_zero_snr": True})
    rescaled = noise_schedule(config, snr_floor=False).alphas_cumprod
    assert rescaled[-1] == 0
    assert noise_schedule(config).alphas_cumprod[-1] == 2.0**-24
    assert rescaled[0] == pytest.approx(plain[0], rel=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 0.5), (2.0, 5.0), (3.0, 0.7)])
def test_beta_quantiles_are_scipys(a: float, b: float) -> None:
    """Quantiles agree with scipy's to twelve digits, from tail to tail."""
    stats = pytest.importorskip("scipy.stats")
    for p in [0.0, 1e-6, 1e-3, 0.02, 0.3, 0.5, 0.77, 0.99, 1 - 1e-6, 1.0]:
        assert beta_quantile(p, a, b) == pytest.approx(stats.beta.ppf(p, a, b), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("count", range(1, 1001, 7))
def test_trailing_spacing_gives_the_number_of_steps_asked_for(count: int) -> None:
    """Trailing spacing starts at the last trained timestep and never leaves the trained range."""
    timesteps = spaced_timesteps("trailing", 1000, count, 0)
    assert len(timesteps) == count
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0


def test_noise_levels_and_timesteps_are_inverse() -> None:
    """The timestep of a trained noise level is its own."""
    sigmas = noise_schedule(Config.parse({})).sigmas
    timesteps = sigma_to_timestep(sigmas.astype(np.float64), sigmas)
    np.testing.assert_allclose(timesteps, np.arange(1000), atol=1e-3)
