"""Flow matching, x = (1 - sigma) x_0 + sigma noise, where the model predicts the velocity noise - x_0.

Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022 (2209.03003); the timestep shift is equation 23 of Esser et al.
2024 (2403.03206).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request
from .plan import Floats, Plan, PlanBuilder
from .schedule import MAX_TRAIN_TIMESTEPS, respaced_sigmas, respacing


def flow_shift_mu(scheduler_config: Mapping[str, Any], tokens: int) -> float:
    """The dynamic shift ``mu`` for an image, linear in its number of latent tokens.

    As the pipelines of models with dynamic shifting do it (FLUX, Stable Diffusion 3.5).

    Args:
        scheduler_config: A diffusers ``scheduler_config.json``.
        tokens: Number of tokens that the transformer sees for the image.

    Raises:
        InvalidRequestError: if the config's values are wrong.
    """
    config = Config.parse(scheduler_config)
    low, high = config.number("base_shift", 0.5), config.number("max_shift", 1.15)
    first = config.integer("base_image_seq_len", 256, 1, 2**31)
    last = config.integer("max_image_seq_len", 4096, 1, 2**31)
    if first == last:
        raise InvalidRequestError(f"scheduler config: base_image_seq_len and max_image_seq_len are both {first}")
    return low + (tokens - first) * (high - low) / (last - first)


def shifted(config: Config, request: Request, levels: Floats, shift: float) -> Floats:
    """Levels moved towards noise, by ``shift``, or by the request's ``mu`` where the config asks for that.

    Raises:
        InvalidRequestError: if the config asks for a dynamic shift and there is no ``mu``.
    """
    if config.flag("use_dynamic_shifting"):
        if request.mu is None:
            raise InvalidRequestError(
                "scheduler config: use_dynamic_shifting is true, but mu is missing; flow_shift_mu gives it for an image"
            )
        kind = config.choice("time_shift_type", ("exponential", "linear"), "exponential")
        shift = math.exp(request.mu) if kind == "exponential" else request.mu
        return np.asarray(shift / (shift + (1 / levels - 1)))
    return np.asarray(shift * levels / (1 + (shift - 1) * levels))


def stretched(config: Config, levels: Floats) -> Floats:
    """Levels stretched so that the last is the config's ``shift_terminal``, where it has one."""
    terminal = config.values.get("shift_terminal")
    if not terminal:
        return levels
    scale = (1 - levels[-1]) / (1 - config.number("shift_terminal", 0.0))
    return np.asarray(1 - (1 - levels) / scale)


def _train_timesteps(config: Config) -> int:
    return config.integer("num_train_timesteps", 1000, 2, MAX_TRAIN_TIMESTEPS)


def _lowest(train: int, shift: float) -> float:
    # The reference keeps the shifted lowest level in float32, and shifts it once more with all the others.
    lowest = np.float32(1) / np.float32(train)
    return float(np.float32(shift) * lowest / (1 + np.float32(shift - 1) * lowest))


def flow_euler(config: Config, request: Request) -> Plan:
    """Euler's method: x + (next sigma - sigma) velocity. As diffusers' ``FlowMatchEulerDiscreteScheduler``.

    With ``stochastic_sampling`` each step goes to the predicted sample and adds fresh noise. From the config of a
    solver that has ``flow_shift`` instead of ``shift``, that is taken.
    """
    train = _train_timesteps(config)
    dynamic = config.flag("use_dynamic_shifting")
    shift = config.number("shift", config.number("flow_shift", 1.0))
    if request.sigmas is not None:
        levels = np.array(request.sigmas, dtype=np.float32).astype(np.float64)
        if not ((levels > 0).all() and (levels <= 1).all() and (np.diff(levels) < 0).all()):
            raise InvalidRequestError(f"sigmas is {levels.tolist()}, expected numbers that descend between 1 and 0")
    elif request.timesteps is not None:
        given = np.array(request.timesteps)
        if not ((given > 0).all() and (given <= train).all() and (np.diff(given) < 0).all()):
            raise InvalidRequestError(f"timesteps is {given.tolist()}, expected to descend between {train} and 0")
        levels = given / train
    else:
        highest, lowest = 1.0, _lowest(train, 1.0 if dynamic else shift)
        levels = np.linspace(highest * train, lowest * train, request.count(train)) / train
    if request.steps is not None and request.steps != len(levels):
        raise InvalidRequestError(f"steps is {request.steps}, but {len(levels)} sigmas are given")
    levels = stretched(config, shifted(config, request, levels, shift))
    if kind := respacing(config):
        high, low = config.positive("sigma_max"), config.positive("sigma_min")
        high, low = high if high is not None else float(levels[0]), low if low is not None else float(levels[-1])
        levels = respaced_sigmas(kind, high, low, len(levels))
    inverted = config.flag("invert_sigmas")
    levels = 1 - levels if inverted else levels
    timesteps = levels * train if request.timesteps is None or inverted else np.array(request.timesteps)
    levels = np.append(levels, 1.0 if inverted else 0.0)
    stochastic = config.flag("stochastic_sampling")
    builder = PlanBuilder(1)
    x, velocity, noise = builder.basis
    for t, sigma, following in zip(timesteps, levels[:-1], levels[1:], strict=True):
        if stochastic:
            latent = (1 - following) * (x - sigma * velocity) + following * noise
        else:
            latent = x + (following - sigma) * velocity
        builder.append(t, [latent], level=(1 - sigma, sigma), draws=stochastic)
    return builder.build()


def flow_heun(config: Config, request: Request) -> Plan:
    """Heun's method: the mean of the velocities at both ends. As diffusers' ``FlowMatchHeunDiscreteScheduler``."""
    train = _train_timesteps(config)
    shift = config.number("shift", config.number("flow_shift", 1.0))
    plain = np.linspace(train, _lowest(train, shift) * train, request.count(train)) / train
    levels = np.append(shift * plain / (1 + (shift - 1) * plain), 0.0)
    builder = PlanBuilder(2)
    x, kept, velocity, _ = builder.basis
    for sigma, following in itertools.pairwise(levels):
        width = following - sigma
        builder.append(sigma * train, [x + width * velocity, x + width / 2 * velocity], level=(1 - sigma, sigma))
        if following > 0:
            latent = kept + width / 2 * velocity
            builder.append(following * train, [latent], level=(1 - following, following), within=True)
    return builder.build()
