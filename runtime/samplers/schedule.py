"""Noise schedules: betas, their cumulative products, noise levels and the timesteps that a sampler visits.

Arrays that a diffusers scheduler keeps in float32 (betas, cumulative products, noise levels) are rounded to float32
here at the same places, and are float64 from there on. The rounding matters: some samplers truncate timesteps that
are interpolated from these tables to integers, and the last bit then decides between two timesteps.

Sources: linear and cosine betas, Ho et al. 2020 (arXiv 2006.11239) and Nichol & Dhariwal 2021 (2102.09672); zero
terminal SNR and timestep spacings, Lin et al. 2023 (2305.08891); noise levels and their spacing, Karras et al. 2022
(2206.00364); beta spacing, Lee et al. 2024 (2407.12173).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.checks import show
from latentrt.engines.errors import InvalidRequestError

from .beta import beta_quantile
from .config import Config
from .plan import Floats

MAX_TRAIN_TIMESTEPS = 100_000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "exp", "laplace", "sigmoid")
SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

# Smallest subnormal of float16: stands in for zero terminal SNR where a noise level must stay finite.
_SNR_FLOOR = 2.0**-24


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The trained noise schedule, with x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.

    Attributes:
        alphas_cumprod: float64 [T], alpha_bar of each trained timestep.
        cosine: Whether the betas are the cosine schedule's.
    """

    alphas_cumprod: Floats
    cosine: bool

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> NDArray[np.float32]:
        """float32 [T], noise level sqrt((1 - alpha_bar) / alpha_bar) of each trained timestep."""
        cumprod = self.alphas_cumprod.astype(np.float32)
        with np.errstate(divide="ignore"):
            return np.asarray(np.sqrt((1 - cumprod) / cumprod))

    def alpha_bar(self, timestep: float) -> float:
        """alpha_bar at a trained timestep.

        Raises:
            InvalidRequestError: if the timestep is not one that the model was trained with.
        """
        if timestep != int(timestep) or not 0 <= timestep < len(self):
            raise InvalidRequestError(
                f"timestep {timestep:g} is not one of the {len(self)} that the model was trained with: "
                "use fewer steps or a smaller steps_offset"
            )
        return float(self.alphas_cumprod[int(timestep)])


def noise_schedule(
    config: Config,
    *,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    zero_snr: bool = True,
    snr_floor: bool = True,
) -> NoiseSchedule:
    """Build the trained noise schedule from a config.

    Args:
        config: The scheduler config.
        beta_start: Default of the target sampler's class.
        beta_end: Default of the target sampler's class.
        beta_schedule: Default of the target sampler's class.
        zero_snr: Whether that class knows ``rescale_betas_zero_snr``.
        snr_floor: Whether that class keeps the last noise level finite at zero terminal SNR.

    Raises:
        InvalidRequestError: if a value is of the wrong kind or out of range.
    """
    count = config.integer("num_train_timesteps", 1000, 2, MAX_TRAIN_TIMESTEPS)
    kind = config.choice("beta_schedule", BETA_SCHEDULES, beta_schedule)
    if config.values.get("trained_betas") is not None:
        given = config.values["trained_betas"]
        try:
            betas = np.asarray(given, dtype=np.float64).astype(np.float32)
        except (TypeError, ValueError):
            raise InvalidRequestError(f"scheduler config: trained_betas is {show(given)}, expected numbers") from None
        if betas.shape != (count,):
            raise InvalidRequestError(
                f"scheduler config: trained_betas has shape {betas.shape}, but num_train_timesteps is {count}"
            )
    else:
        betas = _betas(kind, config.number("beta_start", beta_start), config.number("beta_end", beta_end), count)
    if not (np.isfinite(betas).all() and (betas > 0).all() and (betas < 1).all()):
        raise InvalidRequestError("scheduler config: the betas leave the range between 0 and 1, ends excluded")
    rescale = zero_snr and config.flag("rescale_betas_zero_snr")
    if rescale:
        betas = _rescale_zero_terminal_snr(betas)
    cumprod = _cumprod(1 - betas)
    if rescale and snr_floor:
        cumprod[-1] = _SNR_FLOOR
    return NoiseSchedule(cumprod.astype(np.float64), cosine=kind == "squaredcos_cap_v2")


def _betas(kind: str, start: float, end: float, count: int) -> NDArray[np.float32]:
    if kind == "linear":
        return _linspace(start, end, count)
    if kind == "scaled_linear":
        if min(start, end) < 0:
            raise InvalidRequestError(f"scheduler config: betas from {start} to {end}, expected numbers above zero")
        return np.square(_linspace(math.sqrt(start), math.sqrt(end), count))
    if kind == "sigmoid":
        return (1 / (1 + np.exp(-np.linspace(-6, 6, count))) * (end - start) + start).astype(np.float32)
    t: Floats = np.arange(count + 1) / count
    if kind == "squaredcos_cap_v2":
        bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    elif kind == "exp":
        bar = np.exp(-12.0 * t)
    else:  # laplace
        half = -0.5 * np.copysign(1.0, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
        bar = np.sqrt(np.exp(half) / (1 + np.exp(half)))
    betas: NDArray[np.float32] = np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(np.float32)
    return betas


def _linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    # As torch.linspace in float32: from both ends towards the middle, each value rounded once.
    low, high = np.float32(start), np.float32(end)
    width = np.float64((high - low) / np.float32(count - 1))
    i = np.arange(count)
    values = np.where(i < count // 2, np.float64(low) + width * i, np.float64(high) - width * (count - 1 - i))
    return values.astype(np.float32)


def _cumprod(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _rescale_zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    # Lin et al. 2023, algorithm 1: shift sqrt(alpha_bar) so that it ends at zero, keep where it starts.
    root = np.sqrt(_cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = np.square(root)
    return np.asarray(1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]]))


def spaced_timesteps(
    spacing: str, train: int, count: int, offset: int, *, integer: bool = True, interior: bool = False, last: int = 0
) -> Floats:
    """Timesteps that a sampler visits, descending (Lin et al. 2023, table 2).

    Args:
        spacing: One of ``SPACINGS``.
        train: Number of trained timesteps.
        count: Number of steps.
        offset: ``steps_offset``, added under leading spacing.
        integer: Whether linspace is rounded to trained timesteps.
        interior: Whether linspace and leading spacing place one point more, and leave timestep 0 out.
        last: Number of trained timesteps that are used, counted from 0; 0 means all.

    Returns:
        float64 [count].
    """
    last = last or train
    points = count + interior
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, points)
        # Samplers that do not round keep these in float32.
        timesteps = timesteps.round() if integer else timesteps.astype(np.float32).astype(np.float64)
        return timesteps[::-1][:count]
    if spacing == "leading":
        return (np.arange(points) * (last // points))[::-1][:count].astype(np.float64) + offset
    timesteps = np.round(np.arange(last, 0, -train / count)) - 1
    # Rounding in arange can add a point below zero (61 steps of 1,000 do).
    return timesteps[timesteps >= 0]


def respacing(config: Config) -> str:
    """Which spacing of noise levels a config asks for: ``karras``, ``exponential``, ``beta``, or none.

    Raises:
        InvalidRequestError: if it asks for more than one.
    """
    kinds = [kind for kind in ("karras", "exponential", "beta") if config.flag(f"use_{kind}_sigmas")]
    if len(kinds) > 1:
        raise InvalidRequestError(
            f"scheduler config: use_{kinds[0]}_sigmas and use_{kinds[1]}_sigmas are both true, expected at most one"
        )
    return kinds[0] if kinds else ""


def respaced_sigmas(kind: str, sigma_max: float, sigma_min: float, count: int) -> Floats:
    """Noise levels from ``sigma_max`` down to ``sigma_min``, float64 [count].

    ``karras``: evenly spaced in the 7th root. ``exponential``: evenly spaced in the logarithm. ``beta``: at the
    quantiles of the Beta(0.6, 0.6) distribution.
    """
    if sigma_min > sigma_max:
        raise InvalidRequestError(f"scheduler config: sigma_min {sigma_min:g} is above sigma_max {sigma_max:g}")
    if kind == "karras":
        low, high = sigma_min ** (1 / 7.0), sigma_max ** (1 / 7.0)
        return np.asarray((high + np.linspace(0, 1, count) * (low - high)) ** 7.0)
    if kind == "exponential":
        return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))
    quantiles = np.array([beta_quantile(p, 0.6, 0.6) for p in 1 - np.linspace(0, 1, count)])
    return sigma_min + quantiles * (sigma_max - sigma_min)


def sigma_to_timestep(sigmas: Floats, table: NDArray[np.float32]) -> Floats:
    """Timesteps of noise levels, interpolated linearly in the logarithm of the trained levels.

    Args:
        sigmas: float64 [N].
        table: float32 [T], trained noise levels.

    Returns:
        float64 [N], from 0 to T - 1.
    """
    logs = np.log(table)
    values = np.log(np.maximum(sigmas, 1e-10))
    # The last level that is not above; at zero terminal SNR the table's last entries do not ascend.
    below = values[:, np.newaxis] >= logs
    low = np.where(below.any(axis=1), len(logs) - 1 - np.argmax(below[:, ::-1], axis=1), 0)
    low = np.minimum(low, len(logs) - 2)
    # The difference of two table entries is a float32 in the reference, which decides the last bit.
    weight = np.clip((logs[low] - values) / (logs[low] - logs[low + 1]), 0, 1)
    return np.asarray((1 - weight) * low + weight * (low + 1))


def denoised(prediction: str, x: Floats, output: Floats, alpha: float, sigma: float) -> Floats:
    """The predicted clean sample as a linear expression, for x = alpha x_0 + sigma noise.

    Args:
        prediction: ``epsilon`` (the noise), ``v_prediction`` (alpha noise - sigma x_0; Salimans & Ho 2022, arXiv
            2202.00512), or ``sample`` (x_0).
        x: Expression of the latent.
        output: Expression of the model's output.
        alpha: Signal coefficient.
        sigma: Noise coefficient.
    """
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    return output


def denoised_ve(prediction: str, x: Floats, output: Floats, sigma: float) -> Floats:
    """As :func:`denoised`, for latents in the unscaled form x = x_0 + sigma noise.

    The model sees ``x / sqrt(sigma^2 + 1)``, but ``x`` is the latent itself.
    """
    if prediction == "epsilon":
        return x - sigma * output
    if prediction == "v_prediction":
        return x / (sigma**2 + 1) - output * (sigma / math.sqrt(sigma**2 + 1))
    return output


class VeRow(TypedDict):
    """Level of a row's latent, in the form that adds noise to an unscaled sample; see :meth:`PlanBuilder.append`."""

    level: tuple[float, float]
    input_scale: float


def ve_row(sigma: float) -> VeRow:
    """A row at a noise level, with the factor that gives the latent the variance the model was trained with."""
    return {"level": (1.0, sigma), "input_scale": 1 / math.sqrt(sigma**2 + 1)}
