"""PNDM: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds" (arXiv 2202.09778)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request
from .plan import Floats, Plan, PlanBuilder
from .schedule import PREDICTIONS, SPACINGS, noise_schedule, spaced_timesteps


def pndm(config: Config, request: Request) -> Plan:
    """Linear multistep in the noise, started by Runge-Kutta steps, or, with ``skip_prk_steps``, by a repeated step.

    As diffusers' ``PNDMScheduler``, which has no sample prediction: here such outputs are turned into noise
    predictions first. Its v prediction is combined over the steps before it is turned into noise, as there.

    A run that begins further on (:attr:`Request.begin`) starts as any run does, with a repeated step, which that class
    takes for the one after it: from the third call on its latents are a step behind its timesteps.
    """
    schedule = noise_schedule(config, zero_snr=False)
    train = len(schedule)
    steps = request.count(train)
    prediction = config.choice("prediction_type", PREDICTIONS, "epsilon")
    final = 1.0 if config.flag("set_alpha_to_one") else schedule.alpha_bar(0)
    offset = config.integer("steps_offset", 0, 0, train)
    timesteps = spaced_timesteps(config.choice("timestep_spacing", SPACINGS, "leading"), train, steps, offset)
    stride = train // steps
    skip = config.flag("skip_prk_steps")
    if not skip and steps < 4:
        raise InvalidRequestError(
            f"steps is {steps}, but pndm starts with four Runge-Kutta steps: "
            'use at least 4, or set "skip_prk_steps": true in the scheduler config'
        )

    def transfer(x: Floats, output: Floats, t: float, previous: float) -> Floats:
        """Equation 11 of the paper: the latent at ``previous`` from that at ``t`` and the output between them."""
        bar, bar_previous = schedule.alpha_bar(t), schedule.alpha_bar(previous) if previous >= 0 else final
        if prediction == "v_prediction":
            output = math.sqrt(bar) * output + math.sqrt(1 - bar) * x
        divisor = bar * math.sqrt(1 - bar_previous) + math.sqrt(bar * (1 - bar) * bar_previous)
        return math.sqrt(bar_previous / bar) * x - (bar_previous - bar) / divisor * output

    def noise_of(x: Floats, output: Floats, t: float) -> Floats:
        if prediction != "sample":
            return output
        bar = schedule.alpha_bar(t)
        return (x - math.sqrt(bar) * output) / math.sqrt(1 - bar)

    if request.begin and not skip:
        raise InvalidRequestError(
            "pndm's Runge-Kutta steps begin a whole run and no part of one: "
            'set "skip_prk_steps": true in the scheduler config, or use another sampler'
        )

    def level(t: float) -> tuple[float, float]:
        bar = schedule.alpha_bar(t)
        return math.sqrt(bar), math.sqrt(1 - bar)

    builder = PlanBuilder(4 if skip else 6)
    if skip:
        _repeated_start(builder, timesteps[request.begin :].tolist(), stride, transfer, noise_of, level)
    else:
        _runge_kutta_start(builder, timesteps.tolist(), stride, transfer, noise_of, level)
    return builder.build()


Transfer = Callable[[Floats, Floats, float, float], Floats]
NoiseOf = Callable[[Floats, Floats, float], Floats]
Level = Callable[[float], tuple[float, float]]

# Adams-Bashforth weights, latest first.
_WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _multistep(outputs: Sequence[Floats], count: int) -> Floats:
    weighted = [weight * output for weight, output in zip(_WEIGHTS[count - 1], outputs, strict=False)]
    return sum(weighted[1:], weighted[0])


def _repeated_start(
    builder: PlanBuilder, timesteps: list[float], stride: int, transfer: Transfer, noise_of: NoiseOf, level: Level
) -> None:
    x, *history = builder.basis[:4]
    output = builder.basis[4]
    kept = history[2]  # Holds the first latent until the second row, when history is still short.
    for i, t in enumerate(timesteps):
        e = noise_of(x, output, t)
        count = min(i + 1, 4)
        latent = transfer(x, _multistep([e, *history], count), t, t - stride)
        registers = [latent, e, x if i == 0 else history[0], history[1]] if i else [latent, e, 0 * x, x]
        builder.append(t, registers, level=level(t))
        if i == 0 and len(timesteps) > 1:
            # The second timestep again from the first latent, with the mean of both outputs.
            t = timesteps[1]
            mean = (noise_of(x, output, t) + history[0]) / 2
            builder.append(t, [transfer(kept, mean, t + stride, t), history[0]], level=level(t), within=True)


def _runge_kutta_start(
    builder: PlanBuilder, timesteps: list[float], stride: int, transfer: Transfer, noise_of: NoiseOf, level: Level
) -> None:
    x, h1, h2, h3, kept, total, output, _ = builder.basis
    half = stride // 2
    for start, end in pairwise(timesteps[:4]):
        # Four evaluations: at the start, twice between, and at the end of the step.
        e = noise_of(x, output, start)
        builder.append(start, [transfer(x, e, start, start - half), e, h1, h2, x, e / 6], level=level(start))
        middle = end + half
        e = noise_of(x, output, middle)
        for following in (middle, end):
            registers = [transfer(kept, e, start, following), h1, h2, h3, kept, total + e / 3]
            builder.append(middle, registers, level=level(middle), within=True)
        e = noise_of(x, output, end)
        builder.append(end, [transfer(kept, total + e / 6, start, end), h1, h2, h3], level=level(end), within=True)
    for t in timesteps[3:]:
        e = noise_of(x, output, t)
        builder.append(t, [transfer(x, _multistep([e, h1, h2, h3], 4), t, t - stride), e, h1, h2], level=level(t))
