"""A sampler as data: the linear program that a denoising loop executes.

Every fixed-step sampler updates its state linearly in the latent, the model's output, their history and
fresh noise. A plan holds the coefficients, so that one matrix product executes any sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import InvalidRequestError

Floats: TypeAlias = NDArray[np.float64]
Latents: TypeAlias = NDArray[np.float32]
Model: TypeAlias = Callable[[Latents, float], Latents]
NoiseSource: TypeAlias = Callable[[], Latents]


@dataclass(frozen=True, eq=False)
class Plan:
    """Coefficients of a sampler's run: one row per model call.

    With R registers a sample, register 0 being the latent and the others history (zero at the start), row ``i``
    computes ``registers = update[i] @ [registers; model_output; noise]``, where the model was given
    ``input_scale[i] * registers[0]`` and ``timesteps[i]``. The result of the run is register 0.

    Attributes:
        timesteps: float64 [N], the model's timestep input, in the unit it was trained with.
        input_scale: float64 [N], factor on the latent before the model sees it.
        update: float64 [N, R, R + 2]; columns are the R registers, the model's output, the noise.
        uses_noise: bool [N], where a unit normal tensor is drawn.
        init_scale: The first latent is this times unit normal noise.
        within: Rows that go on with the step of the row before, as the second call of a sampler of second order does.
        levels: float64 [N, 2], how much of the clean sample and how much unit noise register 0 holds before each row:
            a sample is brought to a row as ``levels[i, 0] * sample + levels[i, 1] * noise``. ``None`` is not known.
    """

    timesteps: Floats
    input_scale: Floats
    update: Floats
    uses_noise: NDArray[np.bool_]
    init_scale: float
    within: frozenset[int] = frozenset()
    levels: Floats | None = None

    def __post_init__(self) -> None:
        rows = len(self.timesteps)
        if rows == 0:
            raise InvalidRequestError("a plan needs at least one row, received none")
        shapes = {"input_scale": (rows,), "uses_noise": (rows,), "timesteps": (rows,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise InvalidRequestError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        if self.update.ndim != 3 or self.update.shape[0] != rows or self.update.shape[2] != self.update.shape[1] + 2:
            raise InvalidRequestError(f"update has shape {self.update.shape}, expected [{rows}, R, R + 2]")
        if self.levels is not None and self.levels.shape != (rows, 2):
            raise InvalidRequestError(f"levels has shape {self.levels.shape}, expected {(rows, 2)}")
        for name, kind in {"timesteps": "f8", "input_scale": "f8", "update": "f8", "uses_noise": "?"}.items():
            array = getattr(self, name)
            if array.dtype != np.dtype(kind):
                raise InvalidRequestError(f"{name} is {array.dtype}, expected {np.dtype(kind)}")
            array.flags.writeable = False
        if not np.isfinite(self.init_scale) or not np.isfinite(self.timesteps).all():
            raise InvalidRequestError("the scheduler config leads to timesteps or an initial scale that are not finite")
        finite = np.isfinite(self.update).all(axis=(1, 2)) & np.isfinite(self.input_scale)
        if not finite.all():
            row = int(np.argmin(finite))
            raise InvalidRequestError(
                f"the scheduler config leads to a division by zero in row {row} (timestep {self.timesteps[row]:g}): "
                "use fewer steps, another timestep_spacing, or, at zero terminal SNR, a v_prediction model"
            )

    @property
    def registers(self) -> int:
        """Number of registers R that a sample needs."""
        return int(self.update.shape[1])

    def __len__(self) -> int:
        return len(self.timesteps)

    def part(self, first: int, last: int) -> Plan:
        """The rows from ``first`` to before ``last``, which go on from the latent that the rows before them leave.

        Args:
            first: A row that begins a step, and reads no history.
            last: A row, or their number.

        Raises:
            InvalidRequestError: if there is no such row, or the first needs values that rows before it keep.
        """
        if not 0 <= first < last <= len(self):
            raise InvalidRequestError(f"rows {first} to {last} were asked for of a plan of {len(self)}")
        if first and (first in self.within or self.update[first, :, 1 : self.registers].any()):
            raise InvalidRequestError(f"row {first} of the plan goes on from rows before it, and cannot be the first")
        return Plan(
            timesteps=self.timesteps[first:last],
            input_scale=self.input_scale[first:last],
            update=self.update[first:last],
            uses_noise=self.uses_noise[first:last],
            init_scale=self.init_scale,
            within=frozenset(row - first for row in self.within if first < row < last),
            levels=None if self.levels is None else self.levels[first:last],
        )

    def noised(self, row: int, sample: Latents, noise: Latents) -> Latents:
        """A clean sample with the noise that a run has before a row; unchanged after the last row.

        Args:
            row: A row, or their number.
            sample: float32 [..., C, H, W].
            noise: Unit normal, of the same shape.

        Raises:
            InvalidRequestError: if the plan's levels are not known.
        """
        if self.levels is None:
            raise InvalidRequestError("the plan does not say how much noise there is at its rows")
        signal, deviation = self.levels[row].tolist() if row < len(self) else (1.0, 0.0)
        return np.asarray(np.float32(signal) * sample + np.float32(deviation) * noise)

    def start(self, noise: Latents) -> Latents:
        """Registers before the first row.

        Args:
            noise: Unit normal, float32 [B, C, H, W].

        Returns:
            float32 [R, B, C, H, W].
        """
        registers = np.zeros((self.registers, *noise.shape), dtype=np.float32)
        np.multiply(noise, np.float32(self.init_scale), out=registers[0])
        return registers


class PlanBuilder:
    """Collects a sampler's rows as linear expressions.

    ``basis`` holds one unit vector for each register, then the model's output, then the noise. A sampler combines
    them with plain numpy arithmetic, so that its code reads as the algorithm does.

    Args:
        registers: Number of registers R; register 0 is the latent.
    """

    def __init__(self, registers: int) -> None:
        self.basis: tuple[Floats, ...] = tuple(np.eye(registers + 2))
        self._register_count = registers
        self._timesteps: list[float] = []
        self._input_scale: list[float] = []
        self._update: list[Sequence[Floats]] = []
        self._draws: list[bool] = []
        self._within: set[int] = set()
        self._levels: list[tuple[float, float]] = []

    def append(
        self,
        timestep: float,
        registers: Sequence[Floats],
        *,
        level: tuple[float, float],
        input_scale: float = 1.0,
        draws: bool = False,
        within: bool = False,
    ) -> None:
        """Add a row.

        Args:
            timestep: The model's timestep input.
            registers: New value of each register, as a combination of ``basis``; those left out become zero.
            level: How much of the clean sample, and how much unit noise, register 0 holds before the row.
            input_scale: Factor on register 0 before the model.
            draws: Whether the reference implementation draws noise here, even if its factor is zero.
            within: Whether the row goes on with the step of the row before.
        """
        if within:
            self._within.add(len(self._timesteps))
        padding = [np.zeros(self._register_count + 2)] * (self._register_count - len(registers))
        self._timesteps.append(timestep)
        self._input_scale.append(input_scale)
        self._update.append([*registers, *padding])
        self._draws.append(draws)
        self._levels.append(level)

    def build(self, init_scale: float = 1.0) -> Plan:
        """Finish the plan.

        A draw whose noise has no effect keeps its place in the stream only while a later draw depends on it.

        Raises:
            InvalidRequestError: if a coefficient is not finite.
        """
        update = np.array(self._update, dtype=np.float64)
        draws = np.array(self._draws, dtype=bool)
        effective = (update[:, :, -1] != 0).any(axis=1)
        last = int(np.flatnonzero(effective)[-1]) if effective.any() else -1
        draws[last + 1 :] = False
        return Plan(
            timesteps=np.array(self._timesteps, dtype=np.float64),
            input_scale=np.array(self._input_scale, dtype=np.float64),
            update=update,
            uses_noise=draws,
            init_scale=float(init_scale),
            within=frozenset(self._within),
            levels=np.array(self._levels, dtype=np.float64),
        )


def step(plan: Plan, i: int, registers: Latents, model_output: Latents, noise: Latents | None = None) -> Latents:
    """Execute row ``i`` of a plan.

    Args:
        plan: The plan.
        i: Row.
        registers: float32 [R, B, C, H, W].
        model_output: float32 [B, C, H, W].
        noise: float32 [B, C, H, W], unit normal; needed where ``plan.uses_noise[i]``, else not read.

    Returns:
        The new registers, float32 [R, B, C, H, W]; the arguments stay as they are.

    Raises:
        InvalidRequestError: if the shapes do not fit the plan, or noise is missing.
    """
    if registers.shape != (plan.registers, *model_output.shape):
        raise InvalidRequestError(
            f"registers have shape {registers.shape}, expected {(plan.registers, *model_output.shape)}"
        )
    count = plan.registers
    coefficients = plan.update[i].astype(np.float32)
    flat = registers.reshape(count, -1)
    new: Latents = np.matmul(coefficients[:, :count], flat)
    # Rank-one updates row by row: no stacked copy of all inputs, and a zero coefficient costs nothing.
    inputs = [(coefficients[:, count], model_output)]
    if plan.uses_noise[i]:
        if noise is None or noise.shape != model_output.shape:
            received = "none" if noise is None else f"shape {noise.shape}"
            raise InvalidRequestError(f"row {i} needs noise of shape {model_output.shape}, received {received}")
        inputs.append((coefficients[:, count + 1], noise))
    for column, array in inputs:
        values = array.reshape(-1)
        for row in np.flatnonzero(column):
            new[row] += column[row] * values
    return new.reshape(registers.shape)


def run_plan(plan: Plan, noise: Latents, model: Model, noise_source: NoiseSource | None = None) -> Latents:
    """Run a plan from noise to latents.

    Args:
        plan: The plan.
        noise: Unit normal, float32 [B, C, H, W].
        model: ``model(x, t)``: prediction for latents ``x``, already scaled, at timestep ``t``.
        noise_source: Called without arguments for each further unit normal tensor, exactly where
            ``plan.uses_noise``; needed only if the plan draws at all.

    Returns:
        float32 [B, C, H, W].

    Raises:
        InvalidRequestError: if the plan draws noise and there is no source, or shapes differ.
    """
    if noise_source is None and plan.uses_noise.any():
        raise InvalidRequestError("this sampler draws noise while it runs; pass noise_source")
    registers = plan.start(noise)
    for i in range(len(plan)):
        scale = plan.input_scale[i]
        latents = registers[0] if scale == 1.0 else registers[0] * np.float32(scale)
        output = np.asarray(model(latents, float(plan.timesteps[i])), dtype=np.float32)
        fresh = noise_source() if noise_source is not None and plan.uses_noise[i] else None
        registers = step(plan, i, registers, output, fresh)
    return np.asarray(registers[0])
