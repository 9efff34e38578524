"""The noise levels that multistep solvers in the variance-preserving form x = alpha x_0 + sigma noise step through."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request
from .plan import Floats
from .schedule import (
    PREDICTIONS,
    SPACINGS,
    NoiseSchedule,
    denoised,
    respaced_sigmas,
    respacing,
    sigma_to_timestep,
    spaced_timesteps,
)


@dataclass(frozen=True, eq=False)
class VpSchedule:
    """Where a multistep solver goes.

    Attributes:
        timesteps: float64 [N].
        levels: float64 [N + 1], sigma / alpha before each step and after the last; for a flow, sigma itself.
        prediction: Prediction type.
        flow: Whether alpha is 1 - sigma rather than sqrt(1 - sigma^2).
    """

    timesteps: Floats
    levels: Floats
    prediction: str
    flow: bool

    def alpha(self, i: int) -> float:
        """Signal coefficient before step ``i``."""
        level = float(self.levels[i])
        return 1 - level if self.flow else 1 / math.sqrt(level**2 + 1)

    def sigma(self, i: int) -> float:
        """Noise coefficient before step ``i``."""
        level = float(self.levels[i])
        return level if self.flow else level * self.alpha(i)

    def level(self, i: int) -> tuple[float, float]:
        """Both coefficients before step ``i``."""
        return self.alpha(i), self.sigma(i)

    def log_snr(self, i: int) -> float:
        """Half the logarithm of the signal-to-noise ratio before step ``i``; infinite where no noise is left."""
        sigma = self.sigma(i)
        return math.log(self.alpha(i)) - math.log(sigma) if sigma > 0 else math.inf

    def denoised(self, i: int, x: Floats, output: Floats) -> Floats:
        """The predicted clean sample in step ``i``, as an expression."""
        if self.prediction == "flow_prediction":
            return x - float(self.levels[i]) * output
        return denoised(self.prediction, x, output, self.alpha(i), self.sigma(i))


def vp_schedule(
    config: Config,
    request: Request,
    schedule: NoiseSchedule,
    *,
    final: str,
    final_follows_levels: bool,
    flow_levels: Callable[[Config, Request, int, int], Floats] | None = None,
    clip_log_snr: bool = False,
    round_cosine: bool = True,
    lu: bool = False,
) -> VpSchedule:
    """Noise levels and timesteps, as the diffusers classes of this form derive them.

    Args:
        config: The scheduler config.
        request: Options of the sampler.
        schedule: The trained noise schedule.
        final: ``zero`` or ``sigma_min``: where the last step ends.
        final_follows_levels: Whether ``sigma_min`` is the last respaced level rather than the lowest trained one.
        flow_levels: Levels of a flow from config, request, number of steps and number of trained timesteps, in place
            of those of the DPM-Solver and DEIS classes.
        clip_log_snr: Whether the class knows ``lambda_min_clipped``.
        round_cosine: Whether timesteps of Karras levels are rounded under the cosine schedule too.
        lu: Whether the class knows ``use_lu_lambdas`` (evenly spaced log-SNR).

    Raises:
        InvalidRequestError: if the config or the request contradicts itself.
    """
    train = len(schedule)
    trained = schedule.sigmas
    kind = respacing(config)
    if lu and not kind and config.flag("use_lu_lambdas"):
        kind = "lu"
    flow = config.flag("use_flow_sigmas")
    prediction = config.choice("prediction_type", (*PREDICTIONS, "flow_prediction"), "epsilon")
    if flow and kind:
        raise InvalidRequestError(
            f"scheduler config: use_flow_sigmas and use_{kind}_{'lambdas' if kind == 'lu' else 'sigmas'} are both "
            "true, expected at most one of them"
        )
    given = request.custom_timesteps(train)
    if given is not None and (kind or flow):
        raise InvalidRequestError(
            f"custom timesteps cannot be had with {kind or 'flow'} sigmas: "
            "switch those off in the scheduler config, or leave them out"
        )
    count = request.count(train)
    high, low = config.positive("sigma_max"), config.positive("sigma_min")
    high, low = high if high is not None else float(trained[-1]), low if low is not None else float(trained[0])
    lowest = float(trained[0])
    if kind in ("karras", "exponential", "beta"):
        levels = respaced_sigmas(kind, high, low, count)
        timesteps = sigma_to_timestep(levels, trained)
        rounds = kind == "karras" and (round_cosine or not schedule.cosine)
        timesteps = timesteps.round() if rounds else timesteps
    elif kind == "lu":
        logs = np.log(trained)
        levels = np.exp(np.linspace(float(logs[-1]), float(logs[0]), count))
        timesteps = sigma_to_timestep(levels, trained)
        timesteps = timesteps if schedule.cosine else timesteps.round()
    elif flow:
        levels = (flow_levels or _flow_levels)(config, request, count, train)
        timesteps = levels * train
    else:
        last = train - _clipped(config, schedule) if clip_log_snr else train
        offset = config.integer("steps_offset", 0, 0, train)
        spacing = config.choice("timestep_spacing", SPACINGS, "linspace")
        timesteps = (
            np.trunc(given)
            if given is not None
            else spaced_timesteps(spacing, train, count, offset, interior=True, last=last)
        )
        levels = np.interp(timesteps, np.arange(train), trained)
    if final == "sigma_min" and final_follows_levels and (kind or flow):
        lowest = float(levels[-1])
    levels = np.append(levels, lowest if final == "sigma_min" else 0.0)
    return VpSchedule(
        timesteps=np.trunc(timesteps),
        levels=levels.astype(np.float32).astype(np.float64),
        prediction=prediction,
        flow=flow,
    )


def _flow_levels(config: Config, request: Request, count: int, train: int) -> Floats:
    shift = config.number("flow_shift", 1.0)
    if request.mu is not None and config.flag("use_dynamic_shifting"):
        shift = math.exp(request.mu)
    plain = 1 - np.linspace(1, 1 / train, count + 1)
    return np.asarray(np.flip(shift * plain / (1 + (shift - 1) * plain))[:-1])


def _clipped(config: Config, schedule: NoiseSchedule) -> int:
    """Number of trained timesteps whose log-SNR is below ``lambda_min_clipped``."""
    value = config.values.get("lambda_min_clipped", -math.inf)
    # JSON has no infinity; some writers spell it as a string.
    if value is None or value in (-math.inf, "-inf", "-Infinity"):
        return 0
    log_snr = -np.log(schedule.sigmas)[::-1]
    clipped = int(np.searchsorted(log_snr, config.number("lambda_min_clipped", 0.0)))
    if clipped >= len(schedule):
        raise InvalidRequestError(f"scheduler config: lambda_min_clipped is {value}, which leaves no timestep")
    return clipped
