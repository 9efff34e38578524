"""The denoising loop around engine calls: requests in flight, and the two ways to take them a step further."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine
from latentrt.engines.device import DeviceArray, to_numpy
from latentrt.engines.errors import BundleError, EngineError, InvalidRequestError

from .noise import TorchGenerator
from .request import Request
from .samplers.plan import Plan, step

Floats = NDArray[np.float32]
Conditioning: TypeAlias = Mapping[str, Array]
"""What one text comes to for the denoiser: tensors by name, with a leading dimension of 1."""

TIMESTEPS_AT_ONCE = 64
"""Most rows that the schedule stage is given in one call."""

FINITE_CHECK_EVERY = 8
"""Steps between checks for NaN and infinity of a state that stays on a device."""


@dataclass(eq=False)
class Run:
    """A request in flight, from its noise to its latents.

    Attributes:
        request: The request.
        plan: The sampler's plan.
        conditioning: Its texts: the unconditional one first if the request is guided, the conditional one last.
        generator: Source of all its noise.
        registers: float32 ``[images, R, channels, h, w]``; the first register is the latent. After a step of an engine
            that works on a device they stay there.
        index: Number of the plan's row to run next.
        rows: The denoiser's conditioning for one call: all unconditional rows, then all conditional ones.
        schedule: What the schedule stage computed: by name ``[rows of the plan, 1 or texts, ...]``.
    """

    request: Request
    plan: Plan
    conditioning: Sequence[Conditioning] = field(repr=False)
    generator: TorchGenerator = field(repr=False)
    registers: Floats | DeviceArray = field(repr=False)
    index: int = 0
    rows: Mapping[str, Array] = field(default_factory=dict, repr=False)
    schedule: Mapping[str, Array] = field(default_factory=dict, repr=False)
    _drawn: tuple[int, Floats] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        """Calls of the denoiser that the whole run takes."""
        return len(self.plan)

    @property
    def done(self) -> bool:
        """Whether the last step was taken."""
        return self.index == len(self.plan)

    @property
    def latents(self) -> Floats:
        """float32 ``[images, channels, h, w]``; a view that the next step leaves behind, or a copy from the device."""
        return to_numpy(self.registers)[:, 0]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Images, channels, height and width of the latents; nothing is copied to learn it."""
        return (self.registers.shape[0], *self.registers.shape[2:])

    @property
    def guided(self) -> bool:
        """Whether the next step runs the unconditional half."""
        return self.request.guided_at(self.index, len(self.plan))

    def draw(self) -> Floats | None:
        """Noise for the next step, float32 ``[images, channels, h, w]``; ``None`` where the plan draws none.

        It stays the same until the step was taken: one that failed may be taken again.
        """
        if not self.plan.uses_noise[self.index]:
            return None
        if self._drawn is None or self._drawn[0] != self.index:
            self._drawn = self.index, self.generator.randn(self.latent_shape)
        return self._drawn[1]

    def conditioning_rows(self) -> dict[str, Array]:
        """Conditioning of the next call, one row a picture and half."""
        first = 0 if self.guided or not self.request.guided else self.request.images
        return {name: values[first:] for name, values in self.rows.items()}


def start_run(
    request: Request, plan: Plan, conditioning: Sequence[Conditioning], shape: tuple[int, int, int, int]
) -> Run:
    """A run before its first step, with noise from the request's seed.

    Args:
        request: The request.
        plan: Its sampler's plan.
        conditioning: Its texts, the unconditional one first if the request is guided.
        shape: Of the latents: images, channels, height, width.
    """
    generator = TorchGenerator(request.seed)
    registers = np.zeros((shape[0], plan.registers, *shape[1:]), np.float32)
    np.multiply(generator.randn(shape), np.float32(plan.init_scale), out=registers[:, 0])
    rows = {
        name: np.concatenate([text[name].repeat(request.images, axis=0) for text in conditioning])
        for name in conditioning[-1]
    }
    return Run(request, plan, conditioning, generator, registers, rows=rows)


class Loop(ABC):
    """Takes runs a step further with the engines of one denoiser. Serves many threads; a run belongs to one."""

    name: str
    """What it is called where a pipeline is loaded."""
    prompt_inputs: frozenset[str] = frozenset()
    """Conditioning from which :meth:`condition` computes more; all else it passes on as it is."""

    @abstractmethod
    def condition(self, conditioning: Conditioning) -> dict[str, Array]:
        """What the steps need of texts, all that does not depend on the latents computed.

        Args:
            conditioning: The denoiser's own inputs by name, a row a text.

        Raises:
            BundleError: if the steps need more than that.
            EngineError: if an engine fails.
        """

    @abstractmethod
    def begin(self, run: Run) -> None:
        """Compute once what depends on the run's timesteps alone."""

    @abstractmethod
    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run a step further, with one call of the denoiser for all.

        The runs may differ in sampler, number and index of their steps, guidance and pictures, but not in size.

        Raises:
            InvalidRequestError: if a run is done, is there twice, or has another size than the others.
            EngineError: if an engine fails, or computes values that are not finite; no run has moved then.
        """


class PlainLoop(Loop):
    """One call of the whole denoiser a step; guidance and the sampler's update in numpy.

    Args:
        engine: The opened engine.
        denoiser: The denoiser's component, for messages.
    """

    name = "plain"

    def __init__(self, engine: Engine, denoiser: str = "unet") -> None:
        self._engine, self._denoiser = engine, denoiser

    def condition(self, conditioning: Conditioning) -> dict[str, Array]:
        """Nothing is computed ahead."""
        return dict(conditioning)

    def begin(self, run: Run) -> None:
        """Nothing is computed ahead."""

    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run a step further."""
        check_together(runs)
        samples, timesteps = [], []
        for run in runs:
            scaled = run.latents * np.float32(run.plan.input_scale[run.index])
            halves = 2 if run.guided else 1
            samples += [scaled] * halves
            timesteps.append(np.full(halves * len(scaled), run.plan.timesteps[run.index], np.float32))
        feeds = {"sample": np.concatenate(samples), "timestep": np.concatenate(timesteps)}
        feeds |= _concatenated(run.conditioning_rows() for run in runs)
        predictions = output_of(self._engine, self._denoiser, "out_sample", feeds)
        new, first = [], 0
        for run in runs:
            count = len(run.latents)
            guided = self._guided(predictions[first : first + (2 if run.guided else 1) * count], run)
            first += 2 * count if run.guided else count
            registers = to_numpy(run.registers).swapaxes(0, 1)
            new.append(step(run.plan, run.index, registers, guided, run.draw()).swapaxes(0, 1))
        for run, registers in zip(runs, new, strict=True):
            run.registers = registers
            run.index += 1

    @staticmethod
    def _guided(prediction: Floats, run: Run) -> Floats:
        if not run.guided:
            return prediction
        unconditional, conditional = np.split(prediction, 2)
        combined: Floats = unconditional + np.float32(run.request.guidance) * (conditional - unconditional)
        if run.request.guidance_rescale:
            combined *= _contrast_factor(combined, conditional, run.request.guidance_rescale)
        return combined


class FusedLoop(Loop):
    """The denoiser in stages: prompt and schedule once a request, and steps that are one engine call each.

    With an engine on a device, a run that is taken further alone keeps its registers there: what a step hands out is
    what the next one takes in. What stays the same from step to step is bound once.

    Args:
        step: Opened engine of the fused step.
        prompt: Opened engine of the prompt stage, if there is one.
        schedule: Opened engine of the schedule stage, if there is one.
        denoiser: The denoiser's component, for messages.

    Raises:
        BundleError: if the step is not a fused one.
    """

    name = "fused"

    def __init__(
        self, step: Engine, prompt: Engine | None = None, schedule: Engine | None = None, denoiser: str = "unet"
    ) -> None:
        self._step, self._prompt, self._schedule = step, prompt, schedule
        self._label = f"{denoiser}_step"
        if prompt is not None:
            self.prompt_inputs = frozenset(prompt.inputs)
        self._on_device = getattr(step, "on_device", False)
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
            found |= _hosted(self._prompt.run(cast_feeds(self._prompt, known)))
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
        texts = run.conditioning if self._vectors else run.conditioning[-1:]
        feeds = {"timestep": np.repeat(run.plan.timesteps, len(texts))}
        for name in self._vectors:
            feeds[name] = np.concatenate([text[name] for text in texts] * len(run))
        feeds = cast_feeds(self._schedule, feeds)
        parts = [
            _hosted(
                self._schedule.run({name: values[first : first + TIMESTEPS_AT_ONCE] for name, values in feeds.items()})
            )
            for first in range(0, len(feeds["timestep"]), TIMESTEPS_AT_ONCE)
        ]
        table = parts[0] if len(parts) == 1 else _concatenated(parts)
        run.schedule = {name: v.reshape(len(run), len(texts), *v.shape[1:]) for name, v in table.items()}

    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run a step further."""
        check_together(runs)
        if self._on_device and len(runs) == 1:
            self._advance_on_device(runs[0])
            return
        # A batch of several goes through the host: its rows come from runs whose states lie apart, and the next call
        # may have others. That costs two copies of the latents a step, which is little beside the denoiser.
        count = max(run.plan.registers for run in runs)
        parts, samples, rows = [], 0, 0
        for run in runs:
            state = self._changing(run, count, to_numpy(run.registers))
            parts.append(state | self._constant(run, samples, rows))
            samples += run.request.images
            rows += len(parts[-1]["rows"])
        feeds = _concatenated(parts)
        result = output_of(self._step, self._label, "updated_registers", feeds)
        first = 0
        for run in runs:
            last = first + run.request.images
            run.registers = result[first:last, : run.plan.registers]
            run.index += 1
            first = last

    def _advance_on_device(self, run: Run) -> None:
        bound = self._bind(run)
        # Array stands for device arrays too.
        changing = self._changing(run, run.plan.registers, cast(Floats, run.registers))
        feeds = {name: values for name, values in changing.items() if name not in bound}
        outputs = self._step.run(cast_feeds(self._step, feeds))
        result = output_named(outputs, self._label, "updated_registers")
        # Every register is a sum over all registers, the prediction and the noise, and zero times NaN or infinity is
        # NaN: what was not finite once never becomes finite again. So the last step shows it all; the looks in between
        # only end a lost run early.
        if (run.index + 1) % FINITE_CHECK_EVERY == 0 or run.index + 1 == len(run):
            require_finite(to_numpy(result), self._label)
        if str(result.dtype) != "float32":
            result = to_numpy(result).astype(np.float32)
        run.registers = result
        run.index += 1

    def _bind(self, run: Run) -> frozenset[str]:
        """Bind what the steps of a run have in common, unless it is bound already; returns its names."""
        bound: weakref.WeakKeyDictionary[Engine, _Bound] = _local.__dict__.setdefault(
            "bound", weakref.WeakKeyDictionary()
        )
        last = bound.pop(self._step, None)
        if last is not None and last.run() is run and last.guided == run.guided:
            bound[self._step] = last
            return last.names
        feeds = self._constant(run, 0, 0)
        if not np.any(run.plan.uses_noise):
            feeds["noise"] = np.zeros(run.latent_shape, np.float32)
        self._step.bind(cast_feeds(self._step, feeds))
        bound[self._step] = _Bound(weakref.ref(run), run.guided, frozenset(feeds))
        return bound[self._step].names

    def _changing(self, run: Run, registers: int, state: Floats) -> dict[str, Array]:
        """Inputs that every step has anew for one run of a batch, with room for as many ``registers`` as asked for.

        The run's ``state`` may be on a device if that is its own number.
        """
        samples, own, index = run.request.images, run.plan.registers, run.index
        update = run.plan.update[index].astype(np.float32)
        if own < registers:
            state = np.concatenate([state, np.zeros((samples, registers - own, *state.shape[2:]), np.float32)], axis=1)
            padded = np.zeros((registers, registers + 2), np.float32)
            padded[:own, :own], padded[:own, registers:] = update[:, :own], update[:, own:]
            update = padded
        noise = run.draw()
        feeds: dict[str, Array] = {
            "registers": np.ascontiguousarray(state) if isinstance(state, np.ndarray) else state,
            "noise": np.zeros(run.latent_shape, np.float32) if noise is None else noise,
            "update": np.repeat(update[None], samples, axis=0),
            "input_scale": np.full(samples, run.plan.input_scale[index], np.float32),
        }
        for name, table in run.schedule.items():
            halves = table[index]  # one for all rows, or one for each text
            if len(halves) == 2 and not run.guided:
                halves = halves[1:]
            feeds[name] = np.repeat(halves, samples, axis=0)
        return feeds

    def _constant(self, run: Run, first_sample: int, first_row: int) -> dict[str, Array]:
        """Inputs that stay the same for one run of a batch, as long as guidance is on or off."""
        samples = run.request.images
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
        return feeds | {name: v for name, v in run.conditioning_rows().items() if name in self._step.inputs}


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


def check_together(runs: Sequence[Run]) -> None:
    """Refuse runs that one call cannot take further.

    Raises:
        InvalidRequestError: if there is none, one is done or there twice, or their sizes or lengths of texts differ.
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
        if any(run.rows[name].shape[1:] != rows.shape[1:] for name, rows in runs[0].rows.items() if name in run.rows):
            raise InvalidRequestError(
                "runs with texts of different lengths cannot share a batch; give them one max_sequence_length"
            )


def cast_feeds(engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs in the element types that an engine takes."""
    specs = engine.inputs
    return {name: _cast(array, specs[name].dtype) if name in specs else array for name, array in feeds.items()}


def _cast(array: Any, dtype: str) -> Array:
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


def _hosted(outputs: Mapping[str, Array]) -> dict[str, Array]:
    return {name: to_numpy(values) for name, values in outputs.items()}


def _concatenated(parts: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """The parts' tensors one behind the other; those of a single part as they are."""
    listed = list(parts)
    if len(listed) == 1:
        return dict(listed[0])
    return {name: np.concatenate([part[name] for part in listed]) for name in listed[0]}


def _contrast_factor(combined: Floats, conditional: Floats, share: float) -> Floats:
    """Factor ``[images, 1, 1, 1]`` that brings a ``share`` of the guided prediction to the conditional one's contrast.

    Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16.
    """
    axes = tuple(range(1, combined.ndim))
    ratio = conditional.std(axis=axes, keepdims=True) / np.maximum(combined.std(axis=axes, keepdims=True), 1e-12)
    return np.asarray(share * ratio + (1 - share), np.float32)
