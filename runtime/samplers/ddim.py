"""DDIM: Song et al. 2020, "Denoising Diffusion Implicit Models" (arXiv 2010.02502)."""

from __future__ import annotations

import math

from .config import Config, Request
from .plan import Plan, PlanBuilder
from .schedule import PREDICTIONS, SPACINGS, denoised, noise_schedule, spaced_timesteps


def ddim(config: Config, request: Request) -> Plan:
    """Equations 12 and 16 of the paper; ``eta`` 0 is deterministic, 1 has DDPM's variance.

    As diffusers' ``DDIMScheduler``: the previous timestep is T // steps below, whatever the spacing.
    """
    config.refuse_thresholding()
    config.refuse_clipping("DDIMScheduler")
    schedule = noise_schedule(config, snr_floor=False)
    prediction = config.choice("prediction_type", PREDICTIONS, "epsilon")
    train = len(schedule)
    steps = request.count(train)
    final = 1.0 if config.flag("set_alpha_to_one", True) else schedule.alpha_bar(0)
    eta = request.eta or 0.0
    timesteps = spaced_timesteps(
        config.choice("timestep_spacing", SPACINGS, "leading"),
        train,
        steps,
        config.integer("steps_offset", 0, 0, train),
    )
    builder = PlanBuilder(1)
    x, output, noise = builder.basis
    for t in timesteps:
        bar = schedule.alpha_bar(t)
        previous = schedule.alpha_bar(t - train // steps) if t >= train // steps else final
        alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
        x0 = denoised(prediction, x, output, alpha, sigma)
        epsilon = output if prediction == "epsilon" else (x - alpha * x0) / sigma
        deviation = eta * math.sqrt(max((1 - previous) / (1 - bar) * (1 - bar / previous), 0.0))
        direction = math.sqrt(max(1 - previous - deviation**2, 0.0))
        latent = math.sqrt(previous) * x0 + direction * epsilon + deviation * noise
        builder.append(t, [latent], level=(alpha, sigma), draws=eta > 0)
    return builder.build()
