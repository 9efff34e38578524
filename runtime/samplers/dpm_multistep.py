"""Multistep DPM-Solver and DPM-Solver++: Lu et al. 2022 (arXiv 2206.00927 and 2211.01095).

The solvers step in the half log-SNR lambda = log(alpha / sigma), by h from s to t. DPM-Solver++ integrates the
predicted clean sample, DPM-Solver the predicted noise; the SDE variants add the noise of the reverse-time SDE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request
from .plan import Floats, Plan, PlanBuilder
from .schedule import noise_schedule
from .vp import VpSchedule, vp_schedule

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis")
SOLVER_TYPES = ("midpoint", "heun", "logrho", "bh1", "bh2")


def dpmpp_2m(config: Config, request: Request) -> Plan:
    """DPM-Solver++(2M), or what the config names: diffusers' ``DPMSolverMultistepScheduler``."""
    # As that class, take the names that other solvers write into these keys for its own defaults.
    algorithm = config.choice("algorithm_type", ALGORITHMS, "dpmsolver++")
    return _multistep(config, request, "dpmsolver++" if algorithm == "deis" else algorithm)


def dpmpp_2m_sde(config: Config, request: Request) -> Plan:
    """As :func:`dpmpp_2m` with ``algorithm_type`` ``sde-dpmsolver++``.

    At ``solver_order`` 3 this differs from diffusers, whose weight of the bend has a constant of the wrong sign and
    tends to -1 rather than 0 for short steps, and agrees with :func:`dpmpp_3m_sde`.
    """
    return _multistep(config, request, "sde-dpmsolver++")


def dpmpp_3m_sde(config: Config, request: Request) -> Plan:
    """DPM-Solver++(3M) for the SDE: k-diffusion's ``sample_dpmpp_3m_sde`` with eta 1, from independent noise.

    Noise levels are those of diffusers' DPMSolverMultistepScheduler. As in k-diffusion, orders rise to 3 and stay,
    whatever ``solver_order``, ``solver_type``, ``lower_order_final`` and ``euler_at_final`` say; only a step to noise
    level zero is of first order.
    """
    final = config.choice("final_sigmas_type", ("zero", "sigma_min"), "zero")
    levels = _levels(config, request, final)
    orders = [min(i + 1, 3) for i in range(len(levels.timesteps) - request.begin)]
    if final == "zero":
        orders[-1] = 1
    return _build(levels, "sde-dpmsolver++", True, orders, request.begin)


def _multistep(config: Config, request: Request, algorithm: str) -> Plan:
    if config.values.get("variance_type") in ("learned", "learned_range"):
        raise InvalidRequestError(
            f"scheduler config: variance_type is {config.values['variance_type']!r}, "
            "expected a model that predicts no variance"
        )
    heun = config.choice("solver_type", SOLVER_TYPES, "midpoint") == "heun"
    order = config.integer("solver_order", 2, 1, 3)
    final = config.choice("final_sigmas_type", ("zero", "sigma_min"), "zero")
    if not algorithm.endswith("++") and final == "zero":
        raise InvalidRequestError(
            f"scheduler config: algorithm_type {algorithm!r} cannot end at final_sigmas_type 'zero', "
            "expected 'sigma_min'"
        )
    if algorithm == "sde-dpmsolver" and order == 3:
        raise InvalidRequestError(
            "scheduler config: algorithm_type 'sde-dpmsolver' has solver_order 1 and 2, received 3"
        )
    levels = _levels(config, request, final)
    if levels.prediction == "flow_prediction" and not algorithm.endswith("++"):
        raise InvalidRequestError(
            f"scheduler config: algorithm_type {algorithm!r} takes no flow_prediction, expected 'dpmsolver++'"
        )
    steps = len(levels.timesteps)
    short = config.flag("lower_order_final", True) and steps < 15
    orders = [min(order, i + 1) for i in range(steps - request.begin)]
    if short:
        orders[-2:-1] = [min(value, 2) for value in orders[-2:-1]]
    if short or config.flag("euler_at_final") or final == "zero":
        orders[-1] = 1
    return _build(levels, algorithm, heun, orders, request.begin)


def _levels(config: Config, request: Request, final: str) -> VpSchedule:
    config.refuse_thresholding()
    return vp_schedule(
        config,
        request,
        noise_schedule(config),
        final=final,
        final_follows_levels=False,
        clip_log_snr=True,
        round_cosine=False,
        lu=True,
    )


def _build(levels: VpSchedule, algorithm: str, heun: bool, orders: Sequence[int], begin: int) -> Plan:
    most = max(orders)
    builder = PlanBuilder(most)
    x, *history = builder.basis[:most]
    output, noise = builder.basis[most:]
    for i, order in enumerate(orders, begin):
        model = levels.denoised(i, x, output)
        if not algorithm.endswith("++"):
            model = (x - levels.alpha(i) * model) / levels.sigma(i)
        if levels.levels[i] == levels.levels[i + 1]:
            order = 1  # A step of no length (sigma_min twice) changes nothing, and has no slope in units of its length.
        differences = _differences(levels, i, [model, *history][:order])
        latent = _update(levels, i, algorithm, heun, x, differences, noise)
        kept = [model, *history][: most - 1]
        draws = algorithm.startswith("sde-")
        builder.append(levels.timesteps[i], [latent, *kept], level=levels.level(i), draws=draws)
    return builder.build()


def _differences(levels: VpSchedule, i: int, models: Sequence[Floats]) -> list[Floats]:
    """Value, slope and bend by lambda, in units of h, of the model's prediction at step ``i``, from its history."""
    h = levels.log_snr(i + 1) - levels.log_snr(i)
    if len(models) == 1:
        return [models[0]]
    r0 = (levels.log_snr(i) - levels.log_snr(i - 1)) / h
    slope = (models[0] - models[1]) / r0
    if len(models) == 2:
        return [models[0], slope]
    r1 = (levels.log_snr(i - 1) - levels.log_snr(i - 2)) / h
    bend = (slope - (models[1] - models[2]) / r1) / (r0 + r1)
    return [models[0], slope + r0 * bend, bend]


def _update(
    levels: VpSchedule, i: int, algorithm: str, heun: bool, x: Floats, differences: Sequence[Floats], noise: Floats
) -> Floats:
    """One step of order 1 to 3, as many as there are ``differences``.

    Args:
        levels: Where the solver goes.
        i: Step.
        algorithm: One of ``ALGORITHMS`` but ``deis``.
        heun: Whether the second-order step weighs the slope exactly rather than as the midpoint rule does.
        x: Expression of the latent.
        differences: Value, slope and bend of the model's prediction, as expressions.
        noise: Expression of the noise.
    """
    h = levels.log_snr(i + 1) - levels.log_snr(i)
    alpha_s, sigma_s = levels.alpha(i), levels.sigma(i)
    alpha, sigma = levels.alpha(i + 1), levels.sigma(i + 1)
    if algorithm.endswith("++"):
        # k is the exponent of the decay exp(-k) of the old latent's share; the SDE doubles it.
        k = 2 * h if algorithm.startswith("sde-") else h
        latent = sigma / sigma_s * math.exp(h - k) * x if sigma > 0 else 0 * x
        weights, scale = _decay_weights(k, len(differences), heun), alpha
        deviation = sigma * math.sqrt(-math.expm1(-2 * h)) if k != h else 0.0
    else:
        latent = alpha / alpha_s * x
        double = 2.0 if algorithm.startswith("sde-") else 1.0
        weights, scale = _growth_weights(h, len(differences), heun), -double * sigma
        deviation = sigma * math.sqrt(math.expm1(2 * h)) if double == 2.0 else 0.0
    for weight, difference in zip(weights, differences, strict=True):
        latent = latent + scale * weight * difference
    return latent + deviation * noise


def _decay_weights(k: float, order: int, heun: bool) -> list[float]:
    first = -math.expm1(-k)
    if order == 1:
        return [first]
    slope = 1 - first / k
    if order == 2:
        return [first, slope if heun else first / 2]
    return [first, slope, 0.5 - slope / k]


def _growth_weights(h: float, order: int, heun: bool) -> list[float]:
    first = math.expm1(h)
    if order == 1:
        return [first]
    slope = first / h - 1
    if order == 2:
        return [first, slope if heun else first / 2]
    return [first, slope, slope / h - 0.5]
