"""The parity harness: one sampler, one config, run here and by the diffusers class that is its reference.

Adding a sampler means adding a row to ``ORACLES``.
"""

from __future__ import annotations

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
        sample_prediction: Whether the class takes sample prediction; if not, it is given the equal noise prediction.
    """

    scheduler: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    sample_prediction: bool = True


ORACLES = {
    "ddim": Oracle("DDIMScheduler"),
    "euler": Oracle("EulerDiscreteScheduler"),
    "euler-a": Oracle("EulerAncestralDiscreteScheduler", sample_prediction=False),
    "dpmpp-2m": Oracle("DPMSolverMultistepScheduler"),
}


def model(x: np.ndarray, t: float) -> np.ndarray:
    """A fixed, smooth, nonlinear stand-in for a denoiser, with values of about the size of noise."""
    x = x.astype(np.float64)
    mixed = np.roll(x, 1, axis=-1) - 0.5 * np.roll(x, 2, axis=-2) + 0.3 * np.roll(x, 1, axis=1)
    return (0.6 * x + 0.4 * np.sin(1.3 * mixed + t / 170) + 0.1 * np.cos(t / 90)).astype(np.float32)


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


def reference(
    sampler: str, config: Mapping[str, Any], steps: int | None, set_timesteps: Mapping[str, Any], **step_arguments: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Run diffusers' class as its pipelines do; returns the latents and the timesteps."""
    oracle = ORACLES[sampler]
    overrides = dict(oracle.overrides)
    translate = config.get("prediction_type") == "sample" and not oracle.sample_prediction
    if translate:
        overrides["prediction_type"] = "epsilon"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch.Tensor, "__pow__", exact_power)
        patch.setattr(torch.Tensor, "sqrt", exact_root)
        scheduler = getattr(diffusers, oracle.scheduler).from_config(dict(config), **overrides)
        scheduler.set_timesteps(**({} if steps is None else {"num_inference_steps": steps}), **set_timesteps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        generator = torch.Generator().manual_seed(11)
        arguments = dict(step_arguments)
        if "generator" in scheduler.step.__code__.co_varnames:
            arguments["generator"] = generator
        latents = torch.from_numpy(start_noise()) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, t)
            output = torch.from_numpy(model(scaled.numpy(), float(t)))
            if translate:
                sigma = scheduler.sigmas[scheduler.step_index].double()
                output = ((latents.double() - output.double()) / sigma).float()
            latents = scheduler.step(output, t, latents, **arguments).prev_sample
        return latents.numpy(), scheduler.timesteps.numpy().astype(np.float64)


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    value, expected = value.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def tolerance(config: Mapping[str, Any]) -> float:
    """Relative L2 error allowed: 1e-4, or what float32 can keep where the highest noise level is above 500.

    A latent at noise level sigma is sigma times larger than the sample within it, and both implementations hold it in
    float32 (6e-8): cosine betas reach sigma 2e4, zero terminal SNR 4e3 to 1e4. Both results are then off.
    """
    known = {key: value for key, value in config.items() if key in SCHEDULE_KEYS}
    cumprod = diffusers.EulerDiscreteScheduler(**known).alphas_cumprod.double()
    return max(1e-4, 2e-7 * float(((1 - cumprod) / cumprod).sqrt().max()))


SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class Parity:
    """The harness, handed to tests."""

    samplers: tuple[str, ...] = tuple(ORACLES)

    def error(
        self,
        sampler: str,
        config: Mapping[str, Any],
        steps: int | None,
        set_timesteps: Mapping[str, Any] | None = None,
        **step_arguments: Any,
    ) -> float:
        """Relative L2 distance between this sampler's latents and diffusers', from the same noise stream.

        NaN where diffusers' own latents are not finite; this sampler's must be finite all the same.
        """
        set_timesteps = set_timesteps or {}
        plan = compile_plan(sampler, config, steps, **set_timesteps, **step_arguments)
        generator = torch.Generator().manual_seed(11)
        latents = run_plan(plan, start_noise(), model, lambda: torch.randn(SHAPE, generator=generator).numpy())
        assert np.isfinite(latents).all(), f"{sampler}, {steps} steps, {config}: latents are not finite"
        expected, timesteps = reference(sampler, config, steps, set_timesteps, **step_arguments)
        if not np.isfinite(expected).all():
            return float("nan")
        np.testing.assert_allclose(plan.timesteps, timesteps, rtol=1e-6, atol=1e-4)
        return relative_error(latents, expected)

    def check(
        self,
        sampler: str,
        config: Mapping[str, Any],
        steps: int | None,
        set_timesteps: Mapping[str, Any] | None = None,
        *,
        not_finite: bool = False,
        **step_arguments: Any,
    ) -> None:
        """Fail unless the error is within tolerance, or, with ``not_finite``, diffusers fails to give a number."""
        error = self.error(sampler, config, steps, set_timesteps, **step_arguments)
        if not (not_finite and np.isnan(error)):
            assert error <= tolerance(config), f"{sampler}, {steps} steps, {config}: relative error {error:.2e}"

    def tolerance(self, config: Mapping[str, Any]) -> float:
        """Relative L2 error allowed."""
        return tolerance(config)

    def diffusers_succeeds(self, sampler: str, config: Mapping[str, Any], steps: int) -> bool:
        """Whether diffusers runs this to finite latents."""
        try:
            return bool(np.isfinite(reference(sampler, config, steps, {})[0]).all())
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError):
            return False


@pytest.fixture(scope="session")
def parity() -> Parity:
    """The parity harness."""
    return Parity()
