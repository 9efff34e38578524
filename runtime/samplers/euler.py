"""Euler and ancestral Euler: Karras et al. 2022 (arXiv 2206.00364), algorithm 2, and k-diffusion's ancestral step."""

from __future__ import annotations

import math

from .config import Config, Request
from .plan import Plan, PlanBuilder
from .schedule import noise_schedule, ve_row
from .ve import ve_schedule


def euler(config: Config, request: Request) -> Plan:
    """Euler's method on the probability-flow ODE, dx / dsigma = (x - x_0) / sigma, without churn.

    As diffusers' ``EulerDiscreteScheduler``.
    """
    levels = ve_schedule(config, request, noise_schedule(config), final_sigma=True, log_linear=True, continuous=True)
    builder = PlanBuilder(1)
    x, output, _ = builder.basis
    for t, sigma, following in levels.steps():
        latent = x + levels.derivative(x, output, sigma) * (following - sigma)
        builder.append(t, [latent], **ve_row(sigma))
    return builder.build(levels.init_scale)


def ancestral_split(sigma: float, following: float) -> tuple[float, float]:
    """Noise levels to step down to and then to add, so that the marginal at ``following`` is right.

    Returns:
        The level that the deterministic part ends at, and that of the fresh noise.
    """
    return following**2 / sigma, following * math.sqrt(max(1 - (following / sigma) ** 2, 0.0))


def euler_ancestral(config: Config, request: Request) -> Plan:
    """An Euler step below the next noise level, then fresh noise back up to it.

    As diffusers' ``EulerAncestralDiscreteScheduler``, which knows neither respaced noise levels nor a final one.
    """
    levels = ve_schedule(config, request, noise_schedule(config), respace=False)
    builder = PlanBuilder(1)
    x, output, noise = builder.basis
    for t, sigma, following in levels.steps():
        down, up = ancestral_split(sigma, following)
        latent = x + levels.derivative(x, output, sigma) * (down - sigma) + up * noise
        builder.append(t, [latent], **ve_row(sigma), draws=True)
    return builder.build(levels.init_scale)
