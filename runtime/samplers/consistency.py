"""Samplers of distilled models: latent consistency and trajectory consistency.

Luo et al. 2023 (arXiv 2310.04378) and Zheng et al. 2024 (arXiv 2402.19159).
"""

from __future__ import annotations

import math

import numpy as np

from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request
from .plan import Floats, Plan, PlanBuilder
from .schedule import PREDICTIONS, NoiseSchedule, denoised, noise_schedule


def _schedule(config: Config, request: Request) -> tuple[NoiseSchedule, Floats]:
    """The noise schedule and the timesteps, a subset of those that the model was distilled on."""
    config.refuse_thresholding()
    config.refuse_clipping()
    schedule = noise_schedule(
        config, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", snr_floor=False
    )
    train = len(schedule)
    given = request.custom_timesteps(train)
    if given is not None:
        return schedule, np.trunc(given)
    steps = request.count(train)
    original = config.integer("original_inference_steps", 50, 1, train)
    if steps > original:
        raise InvalidRequestError(
            f"steps is {steps}, expected at most the {original} original_inference_steps that the model was "
            "distilled on"
        )
    distilled = np.arange(1, original + 1) * (train // original) - 1
    if request.strength is not None:  # as diffusers' classes count
        distilled = distilled[: int(original * request.strength)]
        if len(distilled) < steps:
            raise InvalidRequestError(
                f"strength is {request.strength:g}, which leaves {len(distilled)} of the {original} timesteps that the "
                f"model was distilled on, fewer than {steps} steps; use a higher strength or fewer steps"
            )
    indices = np.floor(np.linspace(0, len(distilled), steps, endpoint=False)).astype(np.int64)
    return schedule, distilled[::-1][indices].astype(np.float64)


def lcm(config: Config, request: Request) -> Plan:
    """Multistep consistency sampling: predict the clean sample, add fresh noise, repeat. As diffusers' LCMScheduler."""
    schedule, timesteps = _schedule(config, request)
    prediction = config.choice("prediction_type", PREDICTIONS, "epsilon")
    scaling = config.number("timestep_scaling", 10.0)
    builder = PlanBuilder(1)
    x, output, noise = builder.basis
    for i, t in enumerate(timesteps):
        bar = schedule.alpha_bar(t)
        # The boundary condition makes the consistency function the identity at timestep 0, with sigma_data 1/2.
        skip = 0.25 / ((t * scaling) ** 2 + 0.25)
        out = t * scaling / math.sqrt((t * scaling) ** 2 + 0.25)
        level = math.sqrt(bar), math.sqrt(1 - bar)
        clean = out * denoised(prediction, x, output, *level) + skip * x
        if i + 1 == len(timesteps):
            builder.append(t, [clean], level=level)
        else:
            bar = schedule.alpha_bar(timesteps[i + 1])
            builder.append(t, [math.sqrt(bar) * clean + math.sqrt(1 - bar) * noise], level=level, draws=True)
    return builder.build()


def tcd(config: Config, request: Request) -> Plan:
    """Strategic stochastic sampling: step to below the next timestep, then add noise up to it.

    ``eta`` (gamma in the paper), by default 0.3, says how far below: 0 is deterministic. As diffusers' TCDScheduler.
    """
    schedule, timesteps = _schedule(config, request)
    prediction = config.choice("prediction_type", PREDICTIONS, "epsilon")
    eta = 0.3 if request.eta is None else request.eta
    builder = PlanBuilder(1)
    x, output, noise = builder.basis
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        following = 0.0 if last else timesteps[i + 1]
        # Floored after a product in float32, as the reference does.
        below = float(np.floor(np.float32(1 - eta) * np.float32(following)))
        bar, bar_below, bar_next = (schedule.alpha_bar(s) for s in (t, below, following))
        alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
        x0 = denoised(prediction, x, output, alpha, sigma)
        epsilon = output if prediction == "epsilon" else (x - alpha * x0) / sigma
        latent = math.sqrt(bar_below) * x0 + math.sqrt(1 - bar_below) * epsilon
        if eta > 0 and not last:
            latent = math.sqrt(bar_next / bar_below) * latent + math.sqrt(max(1 - bar_next / bar_below, 0.0)) * noise
        builder.append(t, [latent], level=(alpha, sigma), draws=eta > 0 and not last)
    return builder.build()
