"""The noise levels that samplers in the unscaled form x = x_0 + sigma noise step through (Karras et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request
from .plan import Floats
from .schedule import (
    PREDICTIONS,
    SPACINGS,
    NoiseSchedule,
    denoised_ve,
    respaced_sigmas,
    respacing,
    sigma_to_timestep,
    spaced_timesteps,
)


@dataclass(frozen=True, eq=False)
class VeSchedule:
    """Where a sampler in the unscaled form goes.

    Attributes:
        timesteps: float64 [N].
        sigmas: float64 [N + 1 or more], noise level before each step, then after the last.
        trained: float32 [T], the trained noise levels.
        prediction: Prediction type.
        init_scale: The first latent is this times unit normal noise.
    """

    timesteps: Floats
    sigmas: Floats
    trained: NDArray[np.float32]
    prediction: str
    init_scale: float

    def steps(self) -> Iterator[tuple[float, float, float]]:
        """Timestep, noise level before and noise level after, of each step."""
        count = len(self.timesteps)
        yield from zip(
            self.timesteps.tolist(), self.sigmas[:count].tolist(), self.sigmas[1 : count + 1].tolist(), strict=True
        )

    def timestep(self, sigma: float) -> float:
        """The timestep of a noise level between those of two steps."""
        return float(sigma_to_timestep(np.array([sigma]), self.trained)[0])

    def derivative(self, x: Floats, output: Floats, sigma: float) -> Floats:
        """dx / dsigma of the probability-flow ODE, (x - x_0) / sigma, as an expression."""
        return (x - denoised_ve(self.prediction, x, output, sigma)) / sigma


def ve_schedule(
    config: Config,
    request: Request,
    schedule: NoiseSchedule,
    *,
    respace: bool = True,
    karras_bounds: bool = True,
    final_sigma: bool = False,
    log_linear: bool = False,
    continuous: bool = False,
    convert: Callable[[Floats], Floats] | None = None,
) -> VeSchedule:
    """Noise levels and timesteps, as the diffusers classes of this form derive them.

    Args:
        config: The scheduler config.
        request: Options of the sampler.
        schedule: The trained noise schedule.
        respace: Whether the class knows Karras, exponential and beta spacing.
        karras_bounds: Whether ``sigma_min`` and ``sigma_max`` bound Karras levels; they always bound the others.
        final_sigma: Whether the class knows ``final_sigmas_type``.
        log_linear: Whether the class knows ``interpolation_type``.
        continuous: Whether the class knows ``timestep_type``.
        convert: Applied to the timesteps of Karras levels.

    Raises:
        InvalidRequestError: if the config or the request contradicts itself.
    """
    trained = schedule.sigmas
    kind = respacing(config) if respace else ""
    spacing = config.choice("timestep_spacing", SPACINGS, "linspace")
    prediction = config.choice("prediction_type", PREDICTIONS, "epsilon")
    as_log = continuous and (
        config.choice("timestep_type", ("discrete", "continuous"), "discrete") == "continuous"
        and prediction == "v_prediction"
    )
    interpolation = config.choice("interpolation_type", ("linear", "log_linear"), "linear") if log_linear else "linear"
    final = config.choice("final_sigmas_type", ("zero", "sigma_min"), "zero") if final_sigma else "zero"
    if request.sigmas is not None:
        sigmas = _custom_sigmas(request)
        timesteps = sigma_to_timestep(sigmas[:-1], trained)
    else:
        given = request.custom_timesteps(len(schedule))
        if given is not None and (kind or as_log):
            raise InvalidRequestError(
                f"custom timesteps cannot be had with {kind or 'continuous'} "
                f"{'sigmas' if kind else 'timesteps'}: switch that off in the scheduler config, or leave them out"
            )
        count = request.count(len(schedule))
        timesteps = (
            np.array(given)
            if given is not None
            else spaced_timesteps(
                spacing, len(schedule), count, config.integer("steps_offset", 0, 0, len(schedule)), integer=False
            )
        )
        if interpolation == "log_linear":
            # One level more than there are steps: the run ends at the lowest trained level.
            sigmas = np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), len(timesteps) + 1))
        else:
            sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
        if kind:
            high, low = config.positive("sigma_max"), config.positive("sigma_min")
            bounded = karras_bounds or kind != "karras"
            high = high if bounded and high is not None else float(sigmas[0])
            low = low if bounded and low is not None else float(sigmas[-1])
            sigmas = respaced_sigmas(kind, high, low, count)
            timesteps = sigma_to_timestep(sigmas, trained)
            if kind == "karras" and convert is not None:
                timesteps = convert(timesteps)
        sigmas = np.append(sigmas, float(trained[0]) if final == "sigma_min" else 0.0)
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    if as_log:
        # With log-linear levels there is one more of them, and so one more row.
        timesteps = 0.25 * np.log(sigmas[:-1])
    highest = float(sigmas.max())
    return VeSchedule(
        timesteps=timesteps,
        sigmas=sigmas,
        trained=trained,
        prediction=prediction,
        init_scale=math.hypot(highest, 1.0) if spacing == "leading" else highest,
    )


def _custom_sigmas(request: Request) -> Floats:
    sigmas = np.array(request.sigmas)
    if len(sigmas) < 2 or (np.diff(sigmas) >= 0).any() or sigmas[-1] < 0:
        raise InvalidRequestError(
            f"sigmas is {sigmas.tolist()}, expected at least two that descend, "
            "the last being where the run ends, such as 0"
        )
    if request.steps is not None and request.steps != len(sigmas) - 1:
        raise InvalidRequestError(f"steps is {request.steps}, but {len(sigmas)} sigmas make {len(sigmas) - 1} steps")
    return sigmas
