"""Samplers as linear programs: a scheduler config and a number of steps are compiled into a :class:`Plan`.

Parity is with the diffusers scheduler classes, except where a sampler's own docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request, parse_request
from .ddim import ddim
from .dpm_multistep import dpmpp_2m
from .euler import euler, euler_ancestral
from .plan import Plan, run_plan, step

__all__ = ["SAMPLERS", "Plan", "compile_plan", "default_sampler", "run_plan", "step"]

# Each sampler with the arguments of compile_plan, besides steps, that it takes.
_COMPILERS: dict[str, tuple[Callable[[Config, Request], Plan], tuple[str, ...]]] = {
    "ddim": (ddim, ("eta",)),
    "euler": (euler, ("timesteps", "sigmas")),
    "euler-a": (euler_ancestral, ()),
    "dpmpp-2m": (dpmpp_2m, ("timesteps", "mu")),
}

SAMPLERS: tuple[str, ...] = tuple(_COMPILERS)
"""Names that :func:`compile_plan` takes."""

_DEFAULTS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
}

# Classes whose noise schedule can be read, but whose own sampler is not here.
_SOURCES = (
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "IPNDMScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
)


def compile_plan(
    sampler: str,
    scheduler_config: Mapping[str, Any],
    steps: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
    mu: float | None = None,
) -> Plan:
    """Compile a sampler, a noise schedule and a number of steps into a plan.

    Any sampler takes the config of any diffusers class, as users switch samplers: keys that the sampler's class does
    not know are not read, keys that are missing take that class's defaults (``from_config`` in diffusers). One
    default differs: clipping of the predicted sample is for models of pixels, and is off unless the config says so.

    Args:
        sampler: One of :data:`SAMPLERS`.
        scheduler_config: A diffusers ``scheduler_config.json``.
        steps: Number of steps; may be left out with custom timesteps or sigmas.
        timesteps: Custom timesteps, descending.
        sigmas: Custom noise levels, descending, in the form that the sampler's diffusers class takes.
        eta: From 0 to 1, amount of fresh noise, for the samplers that have the choice.
        mu: Dynamic shift of a flow schedule.

    Raises:
        InvalidRequestError: if the sampler is unknown, a value of the config is wrong or contradicts another, or the
            sampler cannot do what is asked.
    """
    if sampler not in _COMPILERS:
        raise InvalidRequestError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    config = Config.parse(scheduler_config)
    if config.class_name and config.class_name not in (*_DEFAULTS, *_SOURCES):
        raise InvalidRequestError(
            f"scheduler config: _class_name is {config.class_name!r}, expected one of "
            f"{', '.join(sorted((*_DEFAULTS, *_SOURCES)))}"
        )
    compiler, accepts = _COMPILERS[sampler]
    request = parse_request(steps, timesteps, sigmas, eta, mu)
    for name in ("timesteps", "sigmas", "eta", "mu"):
        if getattr(request, name) is not None and name not in accepts:
            raise InvalidRequestError(
                f"sampler {sampler!r} takes no {name}; expected one of "
                f"{', '.join(key for key, (_, taken) in _COMPILERS.items() if name in taken)}, or leave it out"
            )
    try:
        with np.errstate(all="ignore"):
            return compiler(config, request)
    except (ZeroDivisionError, OverflowError) as error:
        raise InvalidRequestError(
            f"{sampler!r} with this scheduler config and {request.steps} steps visits a noise level twice or leaves "
            "the range of numbers: use fewer steps or another timestep_spacing"
        ) from error


def default_sampler(scheduler_config: Mapping[str, Any]) -> str:
    """The sampler that a scheduler config was written for.

    Raises:
        InvalidRequestError: if its class is missing or has no counterpart here.
    """
    config = Config.parse(scheduler_config)
    if config.class_name not in _DEFAULTS:
        raise InvalidRequestError(
            f"scheduler config: _class_name is {config.class_name!r}, which has no sampler here; "
            f"name one of {', '.join(SAMPLERS)}"
        )
    return _DEFAULTS[config.class_name]
