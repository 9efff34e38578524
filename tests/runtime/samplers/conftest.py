"""The parity harness: one sampler, one config, run here and by the diffusers class that is its reference.

Adding a sampler means adding a row to ``ORACLES``.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import math
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentrt.runtime.samplers import compile_plan, run_plan

diffusers.logging.set_verbosity_error()

SHAPE = (2, 4, 6, 5)


@dataclass(frozen=True)
class Oracle:
    """How diffusers runs a sampler.

    Attributes:
        scheduler: Name of the class.
        overrides: Arguments of ``from_config``.
        levels: For a class without sample prediction: alpha and sigma of the latent in the current row, with which a
            predicted sample is turned into the equal noise prediction.
        module: Module of a class that diffusers offers only with another package.
        wide_levels: Whether the exact reference needs noise levels computed in float64 too.
        timestep_error: Error of timesteps that diffusers interpolates in float32.
    """

    scheduler: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    levels: Callable[[Any, Any], tuple[float, float]] | None = None
    module: str = "diffusers"
    wide_levels: bool = False
    timestep_error: float = 1e-4


def at_sigma(scheduler: Any, t: Any) -> tuple[float, float]:
    return 1.0, float(scheduler.sigmas[scheduler.step_index])


def at_interpolated(shift: int) -> Callable[[Any, Any], tuple[float, float]]:
    def levels(scheduler: Any, t: Any) -> tuple[float, float]:
        if scheduler.state_in_first_order:
            return at_sigma(scheduler, t)
        return 1.0, float(scheduler.sigmas_interpol[scheduler.step_index + shift])

    return levels


def at_middle(scheduler: Any, t: Any) -> tuple[float, float]:
    return at_sigma(scheduler, t) if scheduler.state_in_first_order else (1.0, float(scheduler.mid_point_sigma))


def at_timestep(scheduler: Any, t: Any) -> tuple[float, float]:
    cumprod = float(scheduler.alphas_cumprod[t])
    return cumprod**0.5, (1 - cumprod) ** 0.5


SDE_MODULE = "diffusers.schedulers.scheduling_dpmsolver_sde"

ORACLES = {
    "ddim": Oracle("DDIMScheduler"),
    "ddpm": Oracle("DDPMScheduler"),
    "pndm": Oracle("PNDMScheduler", levels=at_timestep),
    "lms": Oracle("LMSDiscreteScheduler"),
    "euler": Oracle("EulerDiscreteScheduler"),
    "euler-a": Oracle("EulerAncestralDiscreteScheduler", levels=at_sigma),
    "heun": Oracle("HeunDiscreteScheduler"),
    "dpm2": Oracle("KDPM2DiscreteScheduler", levels=at_interpolated(0), timestep_error=1e-2),
    "dpm2-a": Oracle(
        "KDPM2AncestralDiscreteScheduler", levels=at_interpolated(-1), wide_levels=True, timestep_error=1e-2
    ),
    "dpmpp-2m": Oracle("DPMSolverMultistepScheduler"),
    "dpmpp-2m-sde": Oracle("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp-sde": Oracle("DPMSolverSDEScheduler", levels=at_middle, module=SDE_MODULE),
    "unipc": Oracle("UniPCMultistepScheduler"),
    "deis": Oracle("DEISMultistepScheduler"),
    "lcm": Oracle("LCMScheduler"),
    "tcd": Oracle("TCDScheduler"),
    "edm-euler": Oracle("EDMEulerScheduler"),
    "flow-euler": Oracle("FlowMatchEulerDiscreteScheduler"),
    "flow-heun": Oracle("FlowMatchHeunDiscreteScheduler"),
}


class BrownianPath:
    """Brownian motion over sigma, in place of torchsde's tree: increments from one normal stream, as they are needed.

    The scheduler asks, in each step, for the increment from sigma to the middle and then from sigma to the end.
    """

    def __init__(self, draw: Callable[[], torch.Tensor]) -> None:
        self.draw = draw
        self.start, self.reached = -1.0, -1.0
        self.value = torch.zeros(())

    def __call__(self, sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        if float(sigma) != self.start:
            self.start = self.reached = float(sigma)
            self.value = torch.zeros(())
        self.value = self.value + (self.reached - float(following)) ** 0.5 * self.draw()
        self.reached = float(following)
        return self.value / (self.start - self.reached) ** 0.5


@functools.lru_cache(maxsize=8)
def construct(module: str, name: str, config: str) -> Any:
    # diffusers' SDE scheduler imports torchsde only for the tree that BrownianPath replaces.
    with pytest.MonkeyPatch.context() as patch:
        if module == SDE_MODULE:
            patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        return getattr(importlib.import_module(module), name).from_config(ast.literal_eval(config))


def model(x: np.ndarray, t: float) -> np.ndarray:
    """A fixed, smooth, nonlinear stand-in for a denoiser, with values of about the size of noise."""
    wide = x.astype(np.float64)
    mixed = np.roll(wide, 1, axis=-1) - 0.5 * np.roll(wide, 2, axis=-2) + 0.3 * np.roll(wide, 1, axis=1)
    return (0.6 * wide + 0.4 * np.sin(1.3 * mixed + t / 170) + 0.1 * np.cos(t / 90)).astype(x.dtype)


def start_noise() -> np.ndarray:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)).numpy()


def exact_power(self: torch.Tensor, exponent: Any, power: Callable[..., Any] = torch.Tensor.__pow__) -> Any:
    """``tensor ** 0.5`` rounded correctly.

    PyTorch's vectorised float32 square root is off by one bit now and then, depending on the processor. Where diffusers
    truncates timesteps interpolated from such roots, that bit moves a whole timestep.
    """
    return exact_root(self) if isinstance(exponent, float) and exponent == 0.5 else power(self, exponent)


def exact_root(self: torch.Tensor, root: Callable[..., Any] = torch.Tensor.sqrt) -> Any:
    """``tensor.sqrt()`` rounded correctly."""
    return root(self.double()).to(self.dtype)


class Wide:
    """A module whose float32 is float64."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def widen(scheduler: Any) -> None:
    """Turn the scheduler's float32 tables into float64 of the same values."""
    for name, value in vars(scheduler).items():
        if torch.is_tensor(value) and value.dtype == torch.float32:
            setattr(scheduler, name, value.double())


def reference(
    sampler: str,
    config: Mapping[str, Any],
    steps: int | None,
    set_timesteps: Mapping[str, Any],
    wide: bool = False,
    **step_arguments: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Run diffusers' class as its pipelines do.

    Args:
        sampler: Name of the sampler.
        config: The scheduler config.
        steps: Number of steps.
        set_timesteps: Further arguments of ``set_timesteps``.
        wide: Make the class compute in float64, from its float32 tables and the same noise.
        step_arguments: Further arguments of ``step``.

    Returns:
        The latents and the timesteps.
    """
    oracle = ORACLES[sampler]
    overrides: dict[str, Any] = dict(oracle.overrides)
    translate = config.get("prediction_type") == "sample" and oracle.levels is not None
    if translate:
        overrides["prediction_type"] = "epsilon"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch.Tensor, "__pow__", exact_power)
        patch.setattr(torch.Tensor, "sqrt", exact_root)
        # Some classes take a tenth of a second to construct; a copy takes none.
        scheduler = copy.deepcopy(construct(oracle.module, oracle.scheduler, repr({**config, **overrides})))
        module = sys.modules[type(scheduler).__module__]
        if wide and oracle.wide_levels:
            widen(scheduler)
            patch.setattr(module, "np", Wide(np))
        scheduler.set_timesteps(**({} if steps is None else {"num_inference_steps": steps}), **set_timesteps)
        if wide:
            widen(scheduler)
            patch.setattr(module, "torch", Wide(torch))
            if hasattr(module, "randn_tensor"):
                patch.setattr(module, "randn_tensor", wide_noise)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        generator = torch.Generator().manual_seed(11)
        arguments = dict(step_arguments)
        if "generator" in scheduler.step.__code__.co_varnames:
            arguments["generator"] = generator
        if oracle.module == SDE_MODULE:
            scheduler.noise_sampler = BrownianPath(lambda: torch.randn(SHAPE, generator=generator))
        latents = torch.from_numpy(start_noise()) * getattr(scheduler, "init_noise_sigma", 1.0)
        latents = latents.double() if wide else latents
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
            output = torch.from_numpy(model(scaled.numpy(), float(t)))
            if translate and oracle.levels is not None:
                alpha, sigma = oracle.levels(scheduler, t)
                output = ((latents.double() - alpha * output.double()) / sigma).to(latents.dtype)
            latents = scheduler.step(output, t, latents, **arguments).prev_sample
        return latents.numpy(), scheduler.timesteps.numpy().astype(np.float64)


def wide_noise(shape: Any, generator: torch.Generator, **ignored: Any) -> torch.Tensor:
    return torch.randn(shape, generator=generator).double()


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    value, expected = value.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


@dataclass(frozen=True)
class Comparison:
    """Relative L2 distances between final latents from the same noise stream.

    Attributes:
        error: From this sampler to diffusers' class; NaN where the class gives no number.
        exact_error: From this sampler to diffusers' class computing in float64; NaN unless ``error`` is above 1e-4.
        diffusers_error: From diffusers' class to itself computing in float64; NaN unless ``error`` is above 1e-4.
    """

    error: float
    exact_error: float = math.nan
    diffusers_error: float = math.nan

    @property
    def holds(self) -> bool:
        """Whether the two agree to 1e-4, or differ only where diffusers' float32 arithmetic does not hold 1e-4.

        That is where it subtracts numbers far larger than their difference: a sample from a latent at a noise level
        in the thousands (cosine betas, zero terminal SNR), or the squares of noise levels of an ancestral step. There
        this sampler must be no further from the exact result than diffusers is, within a factor of two for luck; or
        within 1e-3, where diffusers takes the root of a number that float32 rounds below zero.
        """
        if self.error <= TOLERANCE:
            return True
        allowed = 10 * TOLERANCE if math.isnan(self.error) else max(TOLERANCE, 2 * self.diffusers_error)
        return self.exact_error <= allowed


TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """The harness, handed to tests."""

    samplers: tuple[str, ...] = tuple(ORACLES)

    def compare(
        self,
        sampler: str,
        config: Mapping[str, Any],
        steps: int | None,
        set_timesteps: Mapping[str, Any] | None = None,
        **step_arguments: Any,
    ) -> Comparison:
        """Run a sampler here and in diffusers; timesteps must agree too."""
        set_timesteps, oracle = set_timesteps or {}, ORACLES[sampler]
        plan = compile_plan(sampler, config, steps, **set_timesteps, **step_arguments)
        generator = torch.Generator().manual_seed(11)
        latents = run_plan(plan, start_noise(), model, lambda: torch.randn(SHAPE, generator=generator).numpy())
        assert np.isfinite(latents).all(), f"{sampler}, {steps} steps, {config}: latents are not finite"
        expected, timesteps = reference(sampler, config, steps, set_timesteps, **step_arguments)
        number = bool(np.isfinite(expected).all())
        error = relative_error(latents, expected) if number else math.nan
        if oracle.wide_levels:
            _, timesteps = reference(sampler, config, steps, set_timesteps, wide=True, **step_arguments)
        if number:
            np.testing.assert_allclose(plan.timesteps, timesteps, rtol=1e-6, atol=oracle.timestep_error)
        if error <= TOLERANCE:
            return Comparison(error)
        exact, _ = reference(sampler, config, steps, set_timesteps, wide=True, **step_arguments)
        return Comparison(error, relative_error(latents, exact), relative_error(expected, exact))

    def check(
        self,
        sampler: str,
        config: Mapping[str, Any],
        steps: int | None,
        set_timesteps: Mapping[str, Any] | None = None,
        **step_arguments: Any,
    ) -> None:
        """Fail unless the comparison holds."""
        comparison = self.compare(sampler, config, steps, set_timesteps, **step_arguments)
        assert comparison.holds, f"{sampler}, {steps} steps, {config}: {comparison}"

    def diffusers_succeeds(self, sampler: str, config: Mapping[str, Any], steps: int) -> bool:
        """Whether diffusers runs this to finite latents."""
        try:
            return bool(np.isfinite(reference(sampler, config, steps, {})[0]).all())
        except (ArithmeticError, AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False


@pytest.fixture(scope="session")
def parity() -> Parity:
    """The parity harness."""
    return Parity()
