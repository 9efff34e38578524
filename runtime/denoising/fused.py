"""The fused loop: the denoiser in stages, guidance and update inside its engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from latentrt.engines import Array, Engine
from latentrt.engines.device import to_numpy
from latentrt.engines.errors import BundleError

from ..engine_calls import Conditioning, Floats, cast_feeds, require_finite, to_host
from .batching import Share, joined
from .loop import Call, Loop
from .run import Run
from .schedule_stage import schedule_rows, schedule_table
from .steppers import OUTPUTS, DenoiserStepper, Stepper

FINITE_CHECK_EVERY = 8
"""Steps between checks for NaN and infinity of a state that stays on a device."""


class FusedLoop(Loop):
    """The denoiser in stages: prompt and schedule once a request, and steps that are one engine call each.

    With an engine on a device, a run that advances alone keeps its registers there: what a step hands out is what the
    next one takes. What stays the same from step to step is bound once.

    Args:
        step: Opened engine of the fused step.
        prompt: Opened engine of the prompt stage, if there is one.
        schedule: Opened engine of the schedule stage, if there is one.
        denoiser: The denoiser's component, for messages.
        max_batch: See :class:`Loop`.

    Raises:
        BundleError: if the step is not a fused one.

    Attributes:
        on_device: Whether a run that advances alone keeps its registers on the engine's device.
    """

    name = "fused"

    def __init__(
        self,
        step: Engine,
        prompt: Engine | None = None,
        schedule: Engine | None = None,
        denoiser: str = "unet",
        max_batch: int | None = None,
    ) -> None:
        self._label = f"{denoiser}_step"
        super().__init__(DenoiserStepper(step, self._label, OUTPUTS[self.name]), max_batch)
        self._step, self._prompt, self._schedule = step, prompt, schedule
        if prompt is not None:
            self.prompt_inputs = frozenset(prompt.inputs)
        self.on_device = bool(getattr(step, "on_device", False))
        # Inputs that both halves share, as they share the latents: a mask, and the image outside of it.
        self._of_samples = frozenset(
            name for name, spec in step.inputs.items() if name not in _STEP and spec.shape[:1] == ("batch",)
        )
        self._from_schedule = frozenset(() if schedule is None else schedule.outputs)
        # The schedule may take vectors of the conditioning in; what it computes then differs between the halves.
        self._vectors = () if schedule is None else tuple(name for name in schedule.inputs if name != "timestep")
        if missing := [name for name in _STEP if name not in step.inputs]:
            raise BundleError(
                f"{self._label} has no input {missing[0]!r}, which a fused step has; build the bundle again"
            )

    def condition(self, conditioning: Conditioning) -> dict[str, Array]:
        """Run the prompt stage.

        Raises:
            BundleError: if the steps need more than the stages compute.
            EngineError: if the engine fails.
        """
        found: dict[str, Array] = dict(conditioning)
        if self._prompt is not None:
            known = {name: values for name, values in found.items() if name in self._prompt.inputs}
            # To the host, where encoded texts are cached and put together for a run; that is once a text.
            found |= to_host(self._prompt.run(cast_feeds(self._prompt, known)))
        wanted = {*self._step.inputs, *self._vectors} - self._from_schedule - set(_STEP)
        if missing := sorted(wanted - found.keys()):
            raise BundleError(
                f"{self._label} needs {missing[0]!r}, which no stage of the bundle computes; build it again"
            )
        return {name: values for name, values in found.items() if name in wanted}

    def begin(self, run: Run) -> None:
        """Run the schedule stage on all timesteps of the run, as one batch or a few."""
        if self._schedule is None:
            return
        run.schedule = schedule_table(self._schedule, run)

    def _take_step(self, calls: Sequence[Call]) -> None:
        """Make the calls: one for a whole run stays on the device."""
        if self.on_device and len(calls) == len(calls[0][1]) == 1:
            stepper, (share,) = calls[0]
            self._advance_on_device(stepper, share)
            return
        # A batch of several goes through the host: its rows come from runs whose states lie apart, and the next call
        # may have others. That costs two copies of the latents a step, which is little beside the denoiser.
        super()._take_step(calls)

    def _computed(self, stepper: Stepper, shares: Sequence[Share]) -> list[Floats]:
        count = max(share.run.plan.registers for share in shares)
        parts, samples, rows = [], 0, 0
        for share in shares:
            state = self._changing(share, count, to_numpy(share.run.registers)[share.first : share.last])
            parts.append(state | self._constant(share, samples, rows))
            samples += len(share)
            rows += len(parts[-1]["rows"])
        result = stepper.step(shares, joined(parts))
        new, first = [], 0
        for share in shares:
            new.append(result[first : first + len(share), : share.run.plan.registers])
            first += len(share)
        return new

    def _advance_on_device(self, stepper: Stepper, share: Share) -> None:
        run = share.run
        # Array stands for device arrays too.
        changing = self._changing(share, run.plan.registers, cast(Floats, run.registers))
        result = stepper.step_on_device(share, changing, lambda: self._bindable(share))
        # Every register is a sum over all registers, the prediction and the noise, and zero times NaN or infinity is
        # NaN: what was not finite once never becomes finite again. So the last step shows it all; the looks in between
        # only end a lost run early.
        if (run.index + 1) % FINITE_CHECK_EVERY == 0 or run.index + 1 == len(run):
            require_finite(to_numpy(result), stepper.label)
        if str(result.dtype) != "float32":
            result = to_numpy(result).astype(np.float32)
        run.registers = result
        run.index += 1

    def _bindable(self, share: Share) -> dict[str, Array]:
        """Inputs that all steps of a whole run share."""
        feeds = self._constant(share, 0, 0)
        if not np.any(share.run.plan.uses_noise):
            feeds["noise"] = np.zeros(share.run.latent_shape, np.float32)
        return feeds

    def _changing(self, share: Share, registers: int, state: Floats) -> dict[str, Array]:
        """Inputs that every step has anew for one share of a call.

        Args:
            share: The share.
            registers: Number of registers of the call; a share with fewer is padded with zeros.
            state: Registers of the share; they may be on a device if they need no padding.
        """
        run, samples = share.run, len(share)
        own, index = run.plan.registers, run.index
        update = run.plan.update[index].astype(np.float32)
        if own < registers:
            state = np.concatenate([state, np.zeros((samples, registers - own, *state.shape[2:]), np.float32)], axis=1)
            padded = np.zeros((registers, registers + 2), np.float32)
            padded[:own, :own], padded[:own, registers:] = update[:, :own], update[:, own:]
            update = padded
        noise = share.noise()
        feeds: dict[str, Array] = {
            "registers": np.ascontiguousarray(state) if isinstance(state, np.ndarray) else state,
            "noise": np.zeros((samples, *run.latent_shape[1:]), np.float32) if noise is None else noise,
            "update": np.repeat(update[None], samples, axis=0),
            "input_scale": np.full(samples, run.plan.input_scale[index], np.float32),
        }
        return feeds | schedule_rows(run, run.schedule, samples)

    def _constant(self, share: Share, first_sample: int, first_row: int) -> dict[str, Array]:
        """Inputs that stay the same for one share of a call, as long as guidance is on or off."""
        run, samples = share.run, len(share)
        key = ("denoiser", run.guided)
        alone = share.whole and first_sample == first_row == 0
        if alone and (kept := run.kept.get(key)) is not None:
            return dict(kept)
        guidance = run.request.guidance if run.guided else 1.0
        rescale = run.request.guidance_rescale if run.guided else 0.0
        each = np.arange(samples)
        feeds: dict[str, Array] = {
            "guidance": np.full(samples, guidance, np.float32),
            "guidance_rescale": np.full(samples, rescale, np.float32),
            "rows": share.rows(first_sample),
            "unconditional": first_row + each,
            "conditional": first_row + (each + samples if run.guided else each),
        }
        for name, values in share.conditioning_rows().items():
            if name in self._step.inputs:
                feeds[name] = values[:samples] if name in self._of_samples else values
        if alone:
            run.kept[key] = feeds
        return dict(feeds)


_STEP = (
    *("registers", "noise", "update", "input_scale", "guidance", "guidance_rescale"),
    *("rows", "unconditional", "conditional"),
)
