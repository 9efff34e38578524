"""The plain loop: one call of the whole denoiser a step, guidance and update in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentrt.engines import Array, Engine
from latentrt.engines.device import to_numpy
from latentrt.engines.errors import InvalidRequestError

from ..engine_calls import Conditioning, Floats, output_of
from ..samplers.plan import Plan, step
from .batching import Share, group_by_controlnets, joined, split_into_calls
from .loop import Loop, check_together
from .run import Run

_WHOLE = 1e-3  # what a timestep may be off a whole number by rounding


class PlainLoop(Loop):
    """One call of the whole denoiser a step; guidance and the sampler's update in numpy.

    Args:
        engine: The opened engine.
        denoiser: The denoiser's component, for messages.
        max_batch: See :class:`Loop`.
    """

    name = "plain"

    def __init__(self, engine: Engine, denoiser: str = "unet", max_batch: int | None = None) -> None:
        super().__init__(max_batch)
        self._engine, self._denoiser = engine, denoiser
        # Graphs that others exported may take one timestep for all rows, and that as a whole number.
        timestep = engine.inputs.get("timestep")
        self._one_timestep = timestep is not None and not timestep.shape
        self._whole = timestep is not None and timestep.dtype.startswith("int")

    def check(self, plan: Plan) -> None:
        """Refuse timesteps between two whole ones where the denoiser's graph takes whole ones."""
        if self._whole and (between := between_whole(plan)) is not None:
            raise InvalidRequestError(
                f"the sampler visits the timestep {between:.2f}, but the {self._denoiser} of this bundle takes "
                "whole ones alone; take another sampler, or give timesteps"
            )

    def condition(self, conditioning: Conditioning) -> dict[str, Array]:
        """Nothing is computed ahead."""
        return dict(conditioning)

    def begin(self, run: Run) -> None:
        """Nothing is computed ahead."""

    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run a step further, with one call for each timestep where the graph takes but one."""
        check_together(runs)
        calls = [part for call in split_into_calls(runs, self.max_batch) for part in group_by_controlnets(call)]
        self._advance([part for call in calls for part in self._apart(call)])

    def _apart(self, shares: Sequence[Share]) -> list[list[Share]]:
        """What one call takes, as many calls where its rows must have the same timestep."""
        if not self._one_timestep:
            return [list(shares)]
        found: dict[float, list[Share]] = {}
        for share in shares:
            found.setdefault(float(share.run.plan.timesteps[share.run.index]), []).append(share)
        return list(found.values())

    def _computed(self, shares: Sequence[Share]) -> list[Floats]:
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
        engine, label = self._engine, self._denoiser
        if self.control is not None and shares[0].run.active_controls:
            feeds |= self.control.plain(shares, feeds)
            engine, label = self.control.twin, self.control.label
        predictions = output_of(engine, label, "out_sample", feeds)
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
    """Factor ``[images, 1, 1, 1]`` that brings a ``share`` of the guided prediction to the conditional one's contrast.

    Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16.
    """
    axes = tuple(range(1, combined.ndim))
    ratio = conditional.std(axis=axes, keepdims=True) / np.maximum(combined.std(axis=axes, keepdims=True), 1e-12)
    return np.asarray(share * ratio + (1 - share), np.float32)
