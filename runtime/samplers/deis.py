"""DEIS: Zhang & Chen 2022, "Fast Sampling of Diffusion Models with Exponential Integrator" (arXiv 2204.13902)."""

from __future__ import annotations

import math

from .config import Config, Request
from .dpm_multistep import ALGORITHMS, SOLVER_TYPES
from .lagrange import lagrange_basis
from .plan import Plan, PlanBuilder
from .schedule import noise_schedule
from .vp import vp_schedule


def deis(config: Config, request: Request) -> Plan:
    """Multistep of order 1 to 3: the predicted noise, interpolated in log rho, integrated over rho = sigma / alpha.

    As diffusers' ``DEISMultistepScheduler``, which ends at the lowest noise level rather than at zero.
    """
    config.refuse_thresholding()
    # As that class, take the names that other solvers write into these keys for its own.
    config.choice("algorithm_type", ALGORITHMS, "deis")
    config.choice("solver_type", SOLVER_TYPES, "logrho")
    order = config.integer("solver_order", 2, 1, 3)
    levels = vp_schedule(
        config, request, noise_schedule(config, zero_snr=False), final="sigma_min", final_follows_levels=True
    )
    steps = len(levels.timesteps)
    short = config.flag("lower_order_final", True) and steps < 15
    builder = PlanBuilder(order)
    x, *history = builder.basis[:order]
    output = builder.basis[order]
    rho = levels.levels / (1 - levels.levels) if levels.flow else levels.levels
    for i in range(request.begin, steps):
        noise = (x - levels.alpha(i) * levels.denoised(i, x, output)) / levels.sigma(i)
        use = min(order, i + 1 - request.begin, steps - i if short else order)
        weights = _weights(rho[i - use + 1 : i + 1][::-1].tolist(), float(rho[i + 1]))
        noises = [noise, *history]
        latent = x / levels.alpha(i) + sum(weight * each for weight, each in zip(weights, noises, strict=False))
        kept = noises[: order - 1]
        builder.append(levels.timesteps[i], [levels.alpha(i + 1) * latent, *kept], level=levels.level(i))
    return builder.build()


def _weights(rhos: list[float], following: float) -> list[float]:
    """Integrals over rho, from ``rhos[0]``, of the Lagrange polynomials in log rho over ``rhos``, latest first."""
    nodes = [math.log(rho) for rho in rhos]
    end = math.log(following)
    weights = []
    for i in range(len(nodes)):
        # An antiderivative of p(log rho) is rho q(log rho) with q = p - p' + p'' - ...
        q = term = lagrange_basis(nodes, i)
        for _ in nodes[1:]:
            term = -term.deriv()
            q = q + term
        weights.append(float(following * q(end) - rhos[0] * q(nodes[0])))
    return weights
