"""UniPC: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling" (arXiv 2302.04867)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from latentrt.engines.checks import is_integer, show
from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request
from .flow import shifted, stretched
from .plan import Floats, Plan, PlanBuilder
from .schedule import noise_schedule
from .vp import VpSchedule, vp_schedule


def unipc(config: Config, request: Request) -> Plan:
    """Predict with UniP of order p, correct with UniC once the model has seen the prediction.

    As diffusers' ``UniPCMultistepScheduler``; the correction of a step is made in the row of the next one.
    """
    config.refuse_thresholding()
    if config.values.get("solver_p") is not None:
        raise InvalidRequestError("scheduler config: solver_p names another scheduler, expected null")
    order = config.integer("solver_order", 2, 1, 3)
    bh1 = config.choice("solver_type", ("bh1", "bh2", "midpoint", "heun", "logrho"), "bh2") == "bh1"
    clean = config.flag("predict_x0", True)
    uncorrected = config.values.get("disable_corrector") or []
    if not isinstance(uncorrected, (list, tuple)) or not all(map(is_integer, uncorrected)):
        received = show(uncorrected)
        raise InvalidRequestError(f"scheduler config: disable_corrector is {received}, expected a list of steps")
    if request.sigmas is not None:
        if not config.flag("use_flow_sigmas"):
            raise InvalidRequestError("custom sigmas are given, but unipc takes them only with use_flow_sigmas true")
        if request.steps not in (None, len(request.sigmas)):
            raise InvalidRequestError(f"steps is {request.steps}, but {len(request.sigmas)} sigmas are given")
        request = replace(request, steps=len(request.sigmas))
    levels = vp_schedule(
        config,
        request,
        noise_schedule(config),
        final=config.choice("final_sigmas_type", ("zero", "sigma_min"), "zero"),
        final_follows_levels=True,
        flow_levels=_flow_levels,
    )
    if levels.prediction == "flow_prediction" and not clean:
        raise InvalidRequestError("scheduler config: predict_x0 is false, but flow_prediction needs it to be true")
    steps = len(levels.timesteps)
    lower_final = config.flag("lower_order_final", True)
    begin = request.begin
    orders = [min(order, i - begin + 1, steps - i if lower_final else order) for i in range(steps)]
    # Registers: the latent, the latent before the last prediction, and the last `order` outputs.
    builder = PlanBuilder(2 + order)
    x, before, *history = builder.basis[: 2 + order]
    output = builder.basis[2 + order]
    for i in range(begin, steps):
        model = levels.denoised(i, x, output)
        if not clean:
            model = (x - levels.alpha(i) * model) / levels.sigma(i)
        corrected = x
        if i > begin and i - 1 not in uncorrected:
            corrected = _solve(levels, i - 1, orders[i - 1], bh1, clean, before, history, model)
        latent = _solve(levels, i, orders[i], bh1, clean, corrected, [model, *history], None)
        builder.append(levels.timesteps[i], [latent, corrected, model, *history[:-1]], level=levels.level(i))
    return builder.build()


def _solve(
    levels: VpSchedule,
    i: int,
    order: int,
    bh1: bool,
    clean: bool,
    x: Floats,
    models: Sequence[Floats],
    ahead: Floats | None,
) -> Floats:
    """UniP (without ``ahead``) or UniC (with it) from step ``i`` to the next: equations 3, 8 and 9 of the paper.

    Args:
        levels: Where the solver goes.
        i: Step.
        order: Order p of the predictor; the corrector's is one more.
        bh1: Whether B(h) is h rather than exp(h) - 1.
        clean: Whether the outputs predict the clean sample rather than the noise.
        x: Expression of the latent at step ``i``.
        models: Outputs at step ``i`` and before, latest first.
        ahead: Output at the step's end.
    """
    log_snr = levels.log_snr(i)
    h = levels.log_snr(i + 1) - log_snr
    if h == 0:
        return x
    signed = -h if clean else h
    if clean:
        linear, scale = levels.sigma(i + 1) / levels.sigma(i), levels.alpha(i + 1)
    else:
        linear, scale = levels.alpha(i + 1) / levels.alpha(i), levels.sigma(i + 1)
    growth = math.expm1(signed)
    result = linear * x - scale * growth * models[0]
    ratios = [(levels.log_snr(i - k) - log_snr) / h for k in range(1, order)]
    slopes = [(model - models[0]) / ratio for model, ratio in zip(models[1:order], ratios, strict=True)]
    if ahead is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, ahead - models[0]]
    if not slopes:
        return result
    weight = signed if bh1 else growth
    if len(slopes) == 1:
        # One half is within the order's error of the exact value, and does not depend on B(h).
        rhos = np.array([0.5])
    else:
        moments, phi, factorial = [], growth / signed - 1, 1
        for k in range(len(slopes)):
            moments.append(phi * factorial / weight)
            factorial *= k + 2
            phi = phi / signed - 1 / factorial
        rhos = np.linalg.solve(np.vander(ratios, increasing=True).T, np.array(moments))
    for rho, slope in zip(rhos, slopes, strict=True):
        result = result - scale * weight * float(rho) * slope
    return result


def _flow_levels(config: Config, request: Request, count: int, train: int) -> Floats:
    levels = np.linspace(1, 1 / train, count + 1)[:-1] if request.sigmas is None else np.array(request.sigmas)
    levels = stretched(config, shifted(config, request, levels, config.number("flow_shift", 1.0)))
    # Pure noise has no signal to divide by.
    if abs(levels[0] - 1) < 1e-6:
        levels[0] -= 1e-6
    return levels
