"""DDPM's ancestral sampler: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239)."""

from __future__ import annotations

import math

import numpy as np

from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request
from .plan import Plan, PlanBuilder
from .schedule import PREDICTIONS, SPACINGS, denoised, noise_schedule, spaced_timesteps

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


def ddpm(config: Config, request: Request) -> Plan:
    """Equations 6 and 7 of the paper, between the timesteps that are visited. As diffusers' ``DDPMScheduler``.

    That class takes the root of a logarithm for ``fixed_large_log``, which is not a number; here it is, as its
    name says, the same standard deviation as ``fixed_large``.
    """
    config.refuse_thresholding()
    config.refuse_clipping("DDPMScheduler")
    if config.values.get("variance_type") in ("learned", "learned_range"):
        raise InvalidRequestError(
            f"scheduler config: variance_type is {config.values['variance_type']!r}, "
            "expected a model that predicts no variance"
        )
    schedule = noise_schedule(config, snr_floor=False)
    train = len(schedule)
    prediction = config.choice("prediction_type", PREDICTIONS, "epsilon")
    large = config.choice("variance_type", VARIANCES, "fixed_small").startswith("fixed_large")
    steps = request.count(train)
    offset = config.integer("steps_offset", 0, 0, train)
    spacing = config.choice("timestep_spacing", SPACINGS, "leading")
    given = request.custom_timesteps(train)
    timesteps = np.trunc(given) if given is not None else spaced_timesteps(spacing, train, steps, offset)
    builder = PlanBuilder(1)
    x, output, noise = builder.basis
    for i, t in enumerate(timesteps):
        bar = schedule.alpha_bar(t)
        previous = schedule.alpha_bar(timesteps[i + 1]) if i + 1 < len(timesteps) else 1.0
        beta = 1 - bar / previous
        level = math.sqrt(bar), math.sqrt(1 - bar)
        x0 = denoised(prediction, x, output, *level)
        mean = (math.sqrt(previous) * beta * x0 + math.sqrt(bar / previous) * (1 - previous) * x) / (1 - bar)
        # The floor is the reference's: at the last step the small variance would be zero.
        deviation = math.sqrt(beta) if large else math.sqrt(max((1 - previous) / (1 - bar) * beta, 1e-20))
        builder.append(t, [mean + (deviation if t > 0 else 0.0) * noise], level=level, draws=t > 0)
    return builder.build()
