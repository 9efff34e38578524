"""The plain loop: one call of the whole denoiser a step, guidance and update in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentrt.engines import Array, Engine
from latentrt.engines.device import to_numpy
from latentrt.engines.errors import InvalidRequestError

from ..engine_calls import Conditioning, Floats
from ..samplers.plan import Plan, step
from .batching import Share, joined
from .loop import Call, Loop
from .run import Run
from .steppers import OUTPUTS, DenoiserStepper, Stepper

_WHOLE = 1e-3  # how far rounding may take a timestep from a whole number


class PlainLoop(Loop):
    """One call of the whole denoiser a step; guidance and the sampler's update in numpy.

    Args:
        engine: The opened engine.
        denoiser: The denoiser's component, for messages.
        max_batch: See :class:`Loop`.
    """

    name = "plain"

    def __init__(self, engine: Engine, denoiser: str = "unet", max_batch: int | None = None) -> None:
        super().__init__(DenoiserStepper(engine, denoiser, OUTPUTS[self.name]), max_batch)
        self._denoiser = denoiser
        # Graphs that others exported may take one timestep for all rows, and that as a whole number.
        timestep = engine.inputs.get("timestep")
        self._one_timestep = timestep is not None and not timestep.shape
        self._whole = timestep is not None and timestep.dtype.startswith("int")

    def check(self, plan: Plan) -> None:
        """Refuse timesteps between two whole ones where the denoiser's graph takes whole ones.

        Raises:
            InvalidRequestError: naming the first such timestep.
        """
        if self._whole and (between := between_whole(plan)) is not None:
            raise InvalidRequestError(
                f"the sampler visits the timestep {between:.2f}, but the {self._denoiser} of this bundle takes "
                "whole ones alone; take another sampler, or give timesteps"
            )

    def condition(self, conditioning: Conditioning) -> dict[str, Array]:
        """The same conditioning: nothing is computed ahead."""
        return dict(conditioning)

    def begin(self, run: Run) -> None:
        """Do nothing: nothing is computed ahead."""

    def _calls(self, stepper: Stepper, shares: list[Share]) -> list[Call]:
        """One call, or one for each timestep where the graph takes a single timestep for all rows."""
        if not self._one_timestep:
            return [(stepper, shares)]
        found: dict[float, list[Share]] = {}
        for share in shares:
            found.setdefault(float(share.run.plan.timesteps[share.run.index]), []).append(share)
        return [(stepper, together) for together in found.values()]

    def _computed(self, stepper: Stepper, shares: Sequence[Share]) -> list[Floats]:
        samples, timesteps = [], []
        for share in shares:
            run = share.run
            scaled = run.latents[share.first : share.last] * np.float32(run.plan.input_scale[run.index])
            halves = 2 if run.guided else 1
            samples += [scaled] * halves
            timesteps.append(np.full(halves * len(scaled), run.plan.timesteps[run.index], np.float32))
        times = np.concatenate(timesteps)
        times = np.rint(times) if self._whole else times
        feeds = {"sample": np.concatenate(samples), "timestep": times[:1].reshape(()) if self._one_timestep else times}
        feeds |= joined(share.conditioning_rows() for share in shares)
        predictions = stepper.step(shares, feeds)
        new, first = [], 0
        for share in shares:
            run, rows = share.run, len(share) * (2 if share.run.guided else 1)
            guided = self._guided(predictions[first : first + rows], run)
            first += rows
            registers = to_numpy(run.registers)[share.first : share.last].swapaxes(0, 1)
            new.append(step(run.plan, run.index, registers, guided, share.noise()).swapaxes(0, 1))
        return new

    @staticmethod
    def _guided(prediction: Floats, run: Run) -> Floats:
        """Combine both halves of a prediction by the scale of guidance (Ho & Salimans 2022, arXiv 2207.12598)."""
        if not run.guided:
            return prediction
        unconditional, conditional = np.split(prediction, 2)
        combined: Floats = unconditional + np.float32(run.request.guidance) * (conditional - unconditional)
        if run.request.guidance_rescale:
            combined *= _contrast_factor(combined, conditional, run.request.guidance_rescale)
        return combined


def between_whole(plan: Plan) -> float | None:
    """The first timestep of a plan that is no whole number; ``None`` if all are, to rounding."""
    return next((float(t) for t in plan.timesteps if abs(t - round(t)) > _WHOLE), None)


def _contrast_factor(combined: Floats, conditional: Floats, share: float) -> Floats:
    """Factor ``[images, 1, ...]`` that brings a ``share`` of the guided prediction to the conditional one's contrast.

    Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16.
    """
    axes = tuple(range(1, combined.ndim))
    ratio = conditional.std(axis=axes, keepdims=True) / np.maximum(combined.std(axis=axes, keepdims=True), 1e-12)
    return np.asarray(share * ratio + (1 - share), np.float32)
