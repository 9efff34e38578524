"""Samplers of EDM models, whose preconditioning is their own: Karras et al. 2022 (arXiv 2206.00364), table 1."""

from __future__ import annotations

import math

import numpy as np

from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request
from .plan import Plan, PlanBuilder
from .schedule import MAX_TRAIN_TIMESTEPS


def edm_euler(config: Config, request: Request) -> Plan:
    """Euler's method without churn. As diffusers' ``EDMEulerScheduler``; timesteps are log(sigma) / 4."""
    low, high, data = (
        config.number(*pair) for pair in (("sigma_min", 0.002), ("sigma_max", 80.0), ("sigma_data", 0.5))
    )
    rho = config.number("rho", 7.0)
    if not 0 < low < high or data <= 0 or rho <= 0:
        raise InvalidRequestError(
            f"scheduler config: sigma_min {low:g}, sigma_max {high:g}, sigma_data {data:g} and rho {rho:g}, expected "
            "numbers above zero and sigma_min below sigma_max"
        )
    sign = -1.0 if config.choice("prediction_type", ("epsilon", "v_prediction"), "epsilon") == "v_prediction" else 1.0
    steps = request.count(config.integer("num_train_timesteps", 1000, 1, MAX_TRAIN_TIMESTEPS))
    if config.choice("sigma_schedule", ("karras", "exponential"), "karras") == "karras":
        root_low, root_high = low ** (1 / rho), high ** (1 / rho)
        levels = (root_high + np.linspace(0, 1, steps) * (root_low - root_high)) ** rho
    else:
        levels = np.exp(np.linspace(math.log(low), math.log(high), steps))[::-1]
    final = config.choice("final_sigmas_type", ("zero", "sigma_min"), "zero")
    levels = np.append(levels, levels[-1] if final == "sigma_min" else 0.0).astype(np.float32).astype(np.float64)
    builder = PlanBuilder(1)
    x, output, _ = builder.basis
    for sigma, following in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        variance = sigma**2 + data**2
        x0 = data**2 / variance * x + sign * sigma * data / math.sqrt(variance) * output
        latent = x + (x - x0) / sigma * (following - sigma)
        builder.append(0.25 * math.log(sigma), [latent], level=(1.0, sigma), input_scale=1 / math.sqrt(variance))
    return builder.build(math.hypot(high, 1.0))
