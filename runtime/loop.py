"""The denoising loop around engine calls: the two ways to take runs a step further."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from latentrt.engines import Array, Engine
from latentrt.engines.device import to_numpy
from latentrt.engines.errors import BundleError, EngineError, InvalidRequestError

from .run import Conditioning as Conditioning
from .run import Floats as Floats
from .run import Run as Run
from .run import Share, apart_by_controls, joined, shared_out
from .run import start_run as start_run
from .samplers.plan import Plan, step

if TYPE_CHECKING:
    from .controlnets import ControlNets

TIMESTEPS_AT_ONCE = 64
"""Most rows that the schedule stage is given in one call."""

_DTYPES = {name: np.dtype(name) for name in ("float32", "float16", "int64", "int32")}
_WHOLE = 1e-3  # what a timestep may be off a whole number by rounding

FINITE_CHECK_EVERY = 8
"""Steps between checks for NaN and infinity of a state that stays on a device."""


class Loop(ABC):
    """Takes runs a step further with the engines of one denoiser. Serves many threads; a run belongs to one.

    Args:
        max_batch: Most pictures that one call of the denoiser is given; ``None`` sets no limit.
    """

    name: str
    """What it is called where a pipeline is loaded."""
    prompt_inputs: frozenset[str] = frozenset()
    """Conditioning from which :meth:`condition` computes more; all else it passes on as it is."""
    control: ControlNets | None = None
    """The bundle's ControlNets; needed for runs that have any."""

    def __init__(self, max_batch: int | None = None) -> None:
        self.max_batch = max_batch

    @abstractmethod
    def condition(self, conditioning: Conditioning) -> dict[str, Array]:
        """What the steps need of texts, all that does not depend on the latents computed.

        Args:
            conditioning: The denoiser's own inputs by name, a row a text.

        Raises:
            BundleError: if the steps need more than that.
            EngineError: if an engine fails.
        """

    def check(self, plan: Plan) -> None:  # noqa: B027 - most loops take every plan
        """Refuse a plan that the denoiser cannot follow.

        Raises:
            InvalidRequestError: saying why.
        """

    @abstractmethod
    def begin(self, run: Run) -> None:
        """Compute once what depends on the run's timesteps alone."""

    @abstractmethod
    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run a step further, with one call of the denoiser for all, or as few as :attr:`max_batch` allows.

        The runs may differ in sampler, number and index of their steps, guidance and pictures, but not in size.

        Raises:
            InvalidRequestError: if a run is done, is there twice, or has another size than the others.
            EngineError: if an engine fails, or computes values that are not finite; no run has moved then.
        """

    def _advance(self, calls: Sequence[Sequence[Share]]) -> None:
        """Move all runs at once, after the last call."""
        new: dict[Run, list[Floats]] = {}
        for shares in calls:
            for share, registers in zip(shares, self._computed(shares), strict=True):
                new.setdefault(share.run, []).append(registers)
        for run, parts in new.items():
            run.registers = parts[0] if len(parts) == 1 else np.concatenate(parts)
            run.index += 1

    @abstractmethod
    def _computed(self, shares: Sequence[Share]) -> list[Floats]:
        """New registers of each share, from one call of the denoiser."""


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
        calls = [part for call in shared_out(runs, self.max_batch) for part in apart_by_controls(call)]
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


class FusedLoop(Loop):
    """The denoiser in stages: prompt and schedule once a request, and steps that are one engine call each.

    With an engine on a device, a run that is taken further alone keeps its registers there: what a step hands out is
    what the next one takes in. What stays the same from step to step is bound once.

    Args:
        step: Opened engine of the fused step.
        prompt: Opened engine of the prompt stage, if there is one.
        schedule: Opened engine of the schedule stage, if there is one.
        denoiser: The denoiser's component, for messages.
        max_batch: See :class:`Loop`.

    Raises:
        BundleError: if the step is not a fused one.
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
        super().__init__(max_batch)
        self._step, self._prompt, self._schedule = step, prompt, schedule
        self._label = f"{denoiser}_step"
        if prompt is not None:
            self.prompt_inputs = frozenset(prompt.inputs)
        self._on_device = getattr(step, "on_device", False)
        # What both halves share, as latents: a mask, and what is outside of it.
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
        """Run the prompt stage."""
        found: dict[str, Array] = dict(conditioning)
        if self._prompt is not None:
            known = {name: values for name, values in found.items() if name in self._prompt.inputs}
            # To the host, where texts are cached and put together for a run; that is once a text.
            found |= hosted(self._prompt.run(cast_feeds(self._prompt, known)))
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

    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run a step further."""
        check_together(runs)
        calls = [part for call in shared_out(runs, self.max_batch) for part in apart_by_controls(call)]
        if self._on_device and len(calls) == len(calls[0]) == 1:
            self._advance_on_device(runs[0])
            return
        # A batch of several goes through the host: its rows come from runs whose states lie apart, and the next call
        # may have others. That costs two copies of the latents a step, which is little beside the denoiser.
        self._advance(calls)

    def _computed(self, shares: Sequence[Share]) -> list[Floats]:
        count = max(share.run.plan.registers for share in shares)
        parts, samples, rows = [], 0, 0
        for share in shares:
            state = self._changing(share, count, to_numpy(share.run.registers)[share.first : share.last])
            parts.append(state | self._constant(share, samples, rows))
            samples += len(share)
            rows += len(parts[-1]["rows"])
        feeds, engine, label = joined(parts), self._step, self._label
        if self.control is not None and shares[0].run.active_controls:
            feeds |= self.control.residuals(shares, feeds)
            engine, label = self.control.twin, self.control.label
        result = output_of(engine, label, "updated_registers", feeds)
        new, first = [], 0
        for share in shares:
            new.append(result[first : first + len(share), : share.run.plan.registers])
            first += len(share)
        return new

    def _advance_on_device(self, run: Run) -> None:
        share = Share(run, 0, run.request.images)
        controlled = self.control is not None and bool(run.active_controls)
        engine, label = self._step, self._label
        if self.control is not None and controlled:
            engine, label = self.control.twin, self.control.label
        bound = bound_to(engine, run, lambda: self._bindable(share))
        # Array stands for device arrays too.
        changing = self._changing(share, run.plan.registers, cast(Floats, run.registers))
        feeds = {name: values for name, values in changing.items() if name not in bound}
        if self.control is not None and controlled:
            feeds |= self.control.residuals_on_device(share, changing, self._constant(share, 0, 0)["rows"])
        outputs = engine.run(cast_feeds(engine, feeds))
        result = output_named(outputs, label, "updated_registers")
        # Every register is a sum over all registers, the prediction and the noise, and zero times NaN or infinity is
        # NaN: what was not finite once never becomes finite again. So the last step shows it all; the looks in between
        # only end a lost run early.
        if (run.index + 1) % FINITE_CHECK_EVERY == 0 or run.index + 1 == len(run):
            require_finite(to_numpy(result), label)
        if str(result.dtype) != "float32":
            result = to_numpy(result).astype(np.float32)
        run.registers = result
        run.index += 1

    def _bindable(self, share: Share) -> dict[str, Array]:
        """What the steps of a whole run have in common."""
        feeds = self._constant(share, 0, 0)
        if not np.any(share.run.plan.uses_noise):
            feeds["noise"] = np.zeros(share.run.latent_shape, np.float32)
        return feeds

    def _changing(self, share: Share, registers: int, state: Floats) -> dict[str, Array]:
        """Inputs that every step has anew for one share of a call, with room for as many ``registers`` as asked for.

        Its ``state`` may be on a device if that is its own number.
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
            "rows": first_sample + (np.concatenate([each, each]) if run.guided else each),
            "unconditional": first_row + each,
            "conditional": first_row + (each + samples if run.guided else each),
        }
        for name, values in share.conditioning_rows().items():
            if name in self._step.inputs:
                feeds[name] = values[:samples] if name in self._of_samples else values
        if alone:
            run.kept[key] = feeds
        return dict(feeds)


@dataclass(frozen=True)
class _Bound:
    """What an engine's inputs are bound to. The run is held weakly, for one that is dropped must be gone."""

    run: weakref.ref[Run]
    guided: bool
    names: frozenset[str]


_local = threading.local()  # bound inputs are a thread's own, and an engine's, whichever loop bound them

_STEP = (
    *("registers", "noise", "update", "input_scale", "guidance", "guidance_rescale"),
    *("rows", "unconditional", "conditional"),
)


def bound_to(engine: Engine, run: Run, constant: Callable[[], Mapping[str, Array]]) -> frozenset[str]:
    """Bind what the steps of a whole run have in common to an engine, unless it is bound already.

    Args:
        engine: The engine.
        run: The run.
        constant: Gives these inputs, which stay the same as long as guidance is on or off.

    Returns:
        Their names.
    """
    bound: weakref.WeakKeyDictionary[Engine, _Bound] = _local.__dict__.setdefault("bound", weakref.WeakKeyDictionary())
    last = bound.pop(engine, None)
    if last is not None and last.run() is run and last.guided == run.guided:
        bound[engine] = last
        return last.names
    feeds = constant()
    engine.bind(cast_feeds(engine, feeds))
    bound[engine] = _Bound(weakref.ref(run), run.guided, frozenset(feeds))
    return bound[engine].names


def schedule_table(schedule: Engine, run: Run) -> dict[str, Array]:
    """Run a schedule stage on all timesteps of a run: by name ``[rows of the plan, 1 or texts, ...]``.

    It may take vectors of the conditioning in; what it computes then differs between the texts.
    """
    vectors = [name for name in schedule.inputs if name != "timestep"]
    texts = run.conditioning if vectors else run.conditioning[-1:]
    feeds: dict[str, Array] = {"timestep": np.repeat(run.plan.timesteps, len(texts))}
    for name in vectors:
        feeds[name] = np.concatenate([text[name] for text in texts] * len(run))
    feeds = cast_feeds(schedule, feeds)
    table = joined(
        hosted(schedule.run({name: values[first : first + TIMESTEPS_AT_ONCE] for name, values in feeds.items()}))
        for first in range(0, len(feeds["timestep"]), TIMESTEPS_AT_ONCE)
    )
    return {name: values.reshape(len(run), len(texts), *values.shape[1:]) for name, values in table.items()}


def schedule_rows(run: Run, table: Mapping[str, Array], samples: int) -> dict[str, Array]:
    """What a schedule stage computed for the next step, for each row of some pictures."""
    found: dict[str, Array] = {}
    for name, values in table.items():
        halves = values[run.index]  # one for all rows, or one for each text
        if len(halves) == 2 and not run.guided:
            halves = halves[1:]
        found[name] = halves if samples == 1 else np.repeat(halves, samples, axis=0)
    return found


def check_together(runs: Sequence[Run]) -> None:
    """Refuse runs that one call cannot take further.

    Raises:
        InvalidRequestError: if there is none, one is done or there twice, or their sizes differ.
    """
    if not runs:
        raise InvalidRequestError("no run was given; give at least one")
    if len(set(map(id, runs))) < len(runs):
        raise InvalidRequestError("a run was given twice; give each once")
    for run in runs:
        if run.done:
            raise InvalidRequestError("a run that was given is done; finish it and leave it out")
        if run.latent_shape[1:] != runs[0].latent_shape[1:]:
            sizes = [f"{each.request.width}x{each.request.height}" for each in (runs[0], run)]
            raise InvalidRequestError(f"runs of {sizes[0]} and of {sizes[1]} pixels cannot share a batch")


def cast_feeds(engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs in the element types that an engine takes."""
    specs = engine.inputs
    return {name: _cast(array, specs[name].dtype) if name in specs else array for name, array in feeds.items()}


def _cast(array: Any, dtype: str) -> Array:
    if array.dtype is _DTYPES.get(dtype):  # of the usual ones there is one object each
        return cast(Array, array)
    if not isinstance(array, np.ndarray):
        if str(array.dtype) == dtype:
            return cast(Array, array)  # stays on the device
        array = to_numpy(array)
    return cast(Array, array.astype(dtype, copy=False))


def output_of(engine: Engine, component: str, output: str, feeds: Mapping[str, Array]) -> Floats:
    """One output of an engine, see :func:`outputs_of`."""
    return outputs_of(engine, component, (output,), feeds)[output]


def outputs_of(engine: Engine, component: str, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Floats]:
    """Outputs of an engine in float32, on the host; every input is cast to the element type that its graph takes.

    Raises:
        BundleError: if the engine lacks one of the outputs.
        EngineError: if the engine fails, or an output holds NaN or infinity, which would end in a black picture.
    """
    found = engine.run(cast_feeds(engine, feeds))
    values = {name: to_numpy(output_named(found, component, name)).astype(np.float32, copy=False) for name in names}
    for each in values.values():
        require_finite(each, component)
    return values


def output_named(outputs: Mapping[str, Array], component: str, output: str) -> Array:
    """One of the outputs.

    Raises:
        BundleError: if there is no such output.
    """
    if output not in outputs:
        raise BundleError(f"{component} has no output {output!r}; it has {', '.join(outputs)}")
    return outputs[output]


def require_finite(values: Floats, component: str) -> None:
    """Refuse what would end in a black picture.

    Raises:
        EngineError: if there is a NaN or an infinity.
    """
    if not np.isfinite(values).all():
        raise EngineError(
            f"{component} computed values that are not finite (NaN or infinity); "
            "run it at precision fp32, or with a lower guidance"
        )


def hosted(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of an engine, on the host."""
    return {name: to_numpy(values) for name, values in outputs.items()}


def _contrast_factor(combined: Floats, conditional: Floats, share: float) -> Floats:
    """Factor ``[images, 1, 1, 1]`` that brings a ``share`` of the guided prediction to the conditional one's contrast.

    Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16.
    """
    axes = tuple(range(1, combined.ndim))
    ratio = conditional.std(axis=axes, keepdims=True) / np.maximum(combined.std(axis=axes, keepdims=True), 1e-12)
    return np.asarray(share * ratio + (1 - share), np.float32)
