"""Samplers as linear programs: a scheduler config and a number of steps are compiled into a :class:`Plan`.

Parity is with the diffusers scheduler classes, except where a sampler's own docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from latentrt.engines.errors import InvalidRequestError

from .config import Config, Request, parse_request
from .consistency import lcm, tcd
from .cut import check_part, row_after_skipped, rows_of_part, steps_before
from .ddim import ddim
from .ddpm import ddpm
from .deis import deis
from .dpm_multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde
from .edm import edm_euler
from .euler import euler, euler_ancestral
from .flow import flow_euler, flow_heun, flow_shift_mu
from .lms import lms
from .plan import Plan, run_plan, step
from .pndm import pndm
from .schedule import MAX_TRAIN_TIMESTEPS
from .second_order import dpm2, dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, heun
from .unipc import unipc

__all__ = ["SAMPLERS", "Plan", "compile_plan", "default_sampler", "flow_shift_mu", "run_plan", "step"]

# Each sampler with the arguments of compile_plan, besides steps, that it takes. Those that keep a history take "begin":
# a plan of theirs cannot be cut, since its rows read values that the rows before them kept.
_COMPILERS: dict[str, tuple[Callable[[Config, Request], Plan], tuple[str, ...]]] = {
    "ddim": (ddim, ("eta",)),
    "ddpm": (ddpm, ("timesteps",)),
    "pndm": (pndm, ("begin",)),
    "lms": (lms, ("begin",)),
    "euler": (euler, ("timesteps", "sigmas")),
    "euler-a": (euler_ancestral, ()),
    "heun": (heun, ("timesteps",)),
    "dpm2": (dpm2, ()),
    "dpm2-a": (dpm2_ancestral, ()),
    "dpmpp-2s-a": (dpmpp_2s_ancestral, ("timesteps", "sigmas")),
    "dpmpp-2m": (dpmpp_2m, ("timesteps", "mu", "begin")),
    "dpmpp-2m-sde": (dpmpp_2m_sde, ("timesteps", "mu", "begin")),
    "dpmpp-sde": (dpmpp_sde, ()),
    "dpmpp-3m-sde": (dpmpp_3m_sde, ("timesteps", "mu", "begin")),
    "unipc": (unipc, ("sigmas", "mu", "begin")),
    "deis": (deis, ("mu", "begin")),
    "lcm": (lcm, ("timesteps", "strength")),
    "tcd": (tcd, ("timesteps", "eta", "strength")),
    "edm-euler": (edm_euler, ()),
    "flow-euler": (flow_euler, ("timesteps", "sigmas", "mu")),
    "flow-heun": (flow_heun, ()),
}

SAMPLERS: tuple[str, ...] = tuple(_COMPILERS)
"""Names that :func:`compile_plan` takes."""

_DEFAULTS = {
    "DDIMParallelScheduler": "ddim",
    "DDIMScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "DPMSolverSDEScheduler": "dpmpp-sde",
    "EDMEulerScheduler": "edm-euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
    "FlowMatchHeunDiscreteScheduler": "flow-heun",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm2-a",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}

# Kinds of model whose schedule is not a table of trained noise levels: classes, and the samplers for them.
_KINDS = (
    ("flow", ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"), ("flow-euler", "flow-heun")),
    ("edm", ("EDMEulerScheduler",), ("edm-euler",)),
)
# Solvers that also run flow models, where the config has use_flow_sigmas.
_FLOW_SOLVERS = ("dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m-sde", "unipc", "deis")

# Classes whose noise schedule can be read, but whose own sampler is not here.
_SOURCES = (
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "IPNDMScheduler",
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
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    skipped_steps: int = 0,
    strength: float | None = None,
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
        denoising_start: Fraction of the trained timesteps, counted from pure noise, at which the plan begins: with the
            latent of a run that ended there. A sampler that keeps a history begins with none. ``None`` is the start.
        denoising_end: Fraction at which it ends: the steps that begin after it are left out.
        skipped_steps: Steps to leave out at the start, in place of ``denoising_start``.
        strength: Share of the distilled timesteps, from the last on, among which ``lcm`` and ``tcd`` choose theirs.

    Raises:
        InvalidRequestError: if the sampler is unknown, a value of the config is wrong or contradicts another, or the
            sampler cannot serve the options.
    """
    if sampler not in _COMPILERS:
        raise InvalidRequestError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    config = Config.parse(scheduler_config)
    if config.class_name and config.class_name not in (*_DEFAULTS, *_SOURCES):
        raise InvalidRequestError(
            f"scheduler config: _class_name is {config.class_name!r}, expected one of "
            f"{', '.join(sorted((*_DEFAULTS, *_SOURCES)))}"
        )
    _check_kind(sampler, config)
    compiler, accepts = _COMPILERS[sampler]
    request = replace(parse_request(steps, timesteps, sigmas, eta, mu), strength=strength)
    start, end = check_part(denoising_start, denoising_end)
    for name in ("timesteps", "sigmas", "eta", "mu", "strength"):
        if getattr(request, name) is not None and name not in accepts:
            raise InvalidRequestError(
                f"sampler {sampler!r} takes no {name}; expected one of "
                f"{', '.join(key for key, (_, taken) in _COMPILERS.items() if name in taken)}, or leave it out"
            )
    try:
        with np.errstate(all="ignore"):
            plan = compiler(config, request)
            if skipped_steps:
                first, last = row_after_skipped(plan, skipped_steps, sampler), len(plan)
            elif start is None and end is None:
                return plan
            else:
                first, last = rows_of_part(plan, start, end, _train_timesteps(sampler, config), sampler)
            if first and "begin" in accepts:
                skipped_steps, request = len(plan) - last, replace(request, begin=steps_before(plan, first))
                plan = compiler(config, request)
                first, last = 0, len(plan) - skipped_steps
            return plan.part(first, last)
    except (ZeroDivisionError, OverflowError, np.linalg.LinAlgError) as error:
        raise InvalidRequestError(
            f"{sampler!r} with this scheduler config and {request.steps} steps visits a noise level twice or leaves "
            "the range of numbers: use fewer steps or another timestep_spacing"
        ) from error


def _train_timesteps(sampler: str, config: Config) -> int:
    """Timesteps that a model was trained with, by which a run is cut; some plans give the model another number."""
    if sampler == "edm-euler" or (sampler == "euler" and config.values.get("timestep_type") == "continuous"):
        raise InvalidRequestError(
            "denoising_start and denoising_end are fractions of the timesteps that a model was trained with, and this "
            "one takes logarithms of noise levels; leave them out"
        )
    return config.integer("num_train_timesteps", 1000, 1, MAX_TRAIN_TIMESTEPS)


def _check_kind(sampler: str, config: Config) -> None:
    """Refuse to read a flow model's config as a noise schedule or the other way round: the keys mean other things."""
    for kind, classes, samplers in _KINDS:
        own = config.class_name in classes
        bridged = kind == "flow" and config.flag("use_flow_sigmas") and sampler in (*samplers, *_FLOW_SOLVERS)
        if config.class_name and own != (sampler in samplers) and not bridged:
            raise InvalidRequestError(
                f"sampler {sampler!r} cannot run from the config of {config.class_name!r}: "
                + (
                    f"for a model of kind {kind}, expected {' or '.join(samplers)}"
                    if own
                    else f"it is for {kind} models"
                )
            )


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
    sampler = _DEFAULTS[config.class_name]
    if sampler == "dpmpp-2m" and config.values.get("algorithm_type") == "sde-dpmsolver++":
        return "dpmpp-3m-sde" if config.values.get("solver_order") == 3 else "dpmpp-2m-sde"
    return sampler
