"""Samplers that call the model twice a step: Heun's method, the midpoint methods, and their ancestral forms.

A step from noise level sigma to the next is two rows of the plan: a trial step, with the rest of the result kept in
register 1, then the model at the trial point. A last step to noise level zero is one row.
"""

from __future__ import annotations

import math

import numpy as np

from .config import Config, Request
from .euler import ancestral_split
from .plan import Plan, PlanBuilder
from .schedule import NoiseSchedule, denoised_ve, noise_schedule, ve_row
from .ve import ve_schedule


def _schedule(config: Config) -> NoiseSchedule:
    # The diffusers classes of this family default to Stable Diffusion's betas and know no zero terminal SNR.
    return noise_schedule(config, beta_start=0.00085, beta_end=0.012, zero_snr=False)


def heun(config: Config, request: Request) -> Plan:
    """Heun's method (Karras et al. 2022, algorithm 1, without churn). As diffusers' ``HeunDiscreteScheduler``."""
    config.refuse_clipping()
    levels = ve_schedule(config, request, _schedule(config))
    builder = PlanBuilder(2)
    x, kept, output, _ = builder.basis
    following_timesteps = [*levels.timesteps[1:].tolist(), 0.0]
    for (t, sigma, following), next_t in zip(levels.steps(), following_timesteps, strict=True):
        width = following - sigma
        slope = levels.derivative(x, output, sigma)
        builder.append(t, [x + slope * width, x + slope * width / 2], **ve_row(sigma))
        if following > 0:
            slope = levels.derivative(x, output, following)
            builder.append(next_t, [kept + slope * width / 2], **ve_row(following), within=True)
    return builder.build(levels.init_scale)


def dpm2(config: Config, request: Request) -> Plan:
    """DPM-Solver-2 with its midpoint in log sigma (Karras et al. 2022, algorithm 2's parametrisation; k-diffusion).

    As diffusers' ``KDPM2DiscreteScheduler``.
    """
    levels = ve_schedule(config, request, _schedule(config), convert=np.round)
    builder = PlanBuilder(2)
    x, kept, output, _ = builder.basis
    for t, sigma, following in levels.steps():
        middle = math.sqrt(sigma * following)
        slope = levels.derivative(x, output, sigma)
        builder.append(t, [x + slope * (middle - sigma), x], **ve_row(sigma))
        if following > 0:
            slope = levels.derivative(x, output, middle)
            builder.append(
                levels.timestep(middle),
                [kept + slope * (following - sigma)],
                **ve_row(middle),
                within=True,
            )
    return builder.build(levels.init_scale)


def dpm2_ancestral(config: Config, request: Request) -> Plan:
    """DPM-Solver-2 below the next noise level, then fresh noise. As diffusers' ``KDPM2AncestralDiscreteScheduler``."""
    levels = ve_schedule(config, request, _schedule(config), convert=np.round)
    builder = PlanBuilder(2)
    x, kept, output, noise = builder.basis
    for t, sigma, following in levels.steps():
        down, up = ancestral_split(sigma, following)
        middle = math.sqrt(sigma * down)
        slope = levels.derivative(x, output, sigma)
        builder.append(t, [x + slope * (middle - sigma), x], **ve_row(sigma))
        if following > 0:
            latent = kept + levels.derivative(x, output, middle) * (down - sigma) + up * noise
            builder.append(levels.timestep(middle), [latent], **ve_row(middle), draws=True, within=True)
    return builder.build(levels.init_scale)


def dpmpp_2s_ancestral(config: Config, request: Request) -> Plan:
    """Ancestral DPM-Solver++(2S): k-diffusion's ``sample_dpmpp_2s_ancestral`` with eta 1.

    The single-step solver of Lu et al. 2022 (arXiv 2211.01095, algorithm 1). Diffusers has no class for it; noise
    levels are chosen as for Euler's method, with respacing.
    """
    levels = ve_schedule(config, request, noise_schedule(config))
    builder = PlanBuilder(2)
    x, kept, output, noise = builder.basis
    for t, sigma, following in levels.steps():
        down, up = ancestral_split(sigma, following)
        middle = math.sqrt(sigma * down)
        x0 = denoised_ve(levels.prediction, x, output, sigma)
        share = middle / sigma
        builder.append(t, [share * x + (1 - share) * x0, down / sigma * x], **ve_row(sigma))
        if following > 0:
            x0 = denoised_ve(levels.prediction, x, output, middle)
            latent = kept + (1 - down / sigma) * x0 + up * noise
            builder.append(levels.timestep(middle), [latent], **ve_row(middle), draws=True, within=True)
    return builder.build(levels.init_scale)


def dpmpp_sde(config: Config, request: Request) -> Plan:
    """DPM-Solver++ for the reverse-time SDE, with its midpoint in log sigma: diffusers' ``DPMSolverSDEScheduler``.

    Both rows of a step see the same Brownian motion over sigma, from sigma to the middle and from sigma to the next
    level. That class takes it from torchsde's Brownian tree, whose random stream cannot be had here: instead the
    second row adds its own draw to the first row's so that both have exactly the tree's joint distribution.
    """
    levels = ve_schedule(config, request, _schedule(config), karras_bounds=False)
    builder = PlanBuilder(2)
    x, kept, output, noise = builder.basis
    for t, sigma, following in levels.steps():
        x0 = denoised_ve(levels.prediction, x, output, sigma)
        if following == 0:
            builder.append(t, [x0], **ve_row(sigma))
            continue
        middle = math.sqrt(sigma * following)
        down, up = ancestral_split(sigma, middle)
        trial = down / sigma * x + (1 - down / sigma) * x0 + up * noise
        down, up = ancestral_split(sigma, following)
        shared = (sigma - middle) / (sigma - following)
        rest = down / sigma * x + up * math.sqrt(shared) * noise
        builder.append(t, [trial, rest], **ve_row(sigma), draws=True)
        x0 = denoised_ve(levels.prediction, x, output, middle)
        latent = kept + (1 - down / sigma) * x0 + up * math.sqrt(1 - shared) * noise
        builder.append(levels.timestep(middle), [latent], **ve_row(middle), draws=True, within=True)
    return builder.build(levels.init_scale)
