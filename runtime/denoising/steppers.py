"""Steppers: each says which runs' next step it takes, and computes that step with a graph of its own.

A loop asks its steppers in order, and the first that takes a run's next step computes it: a twin of the denoiser with
ControlNets before the denoiser itself, which takes every step. A further kind of step is a class of its own that goes
into :data:`latentrt.runtime.components.opening.STEPPERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine

from ..engine_calls import Conditioning, Floats, cast_feeds, output_named, output_of
from ..request.request import Request
from .batching import Share
from .binding import bound_to
from .run import Run

OUTPUTS = {"fused": "updated_registers", "plain": "out_sample"}
"""The output of a step's graph by the name of the loop: new registers in the fused one, a prediction in the plain."""


class Stepper(ABC):
    """Computes a step of runs. Serves many threads; a run belongs to one.

    Attributes:
        label: What messages call it.
    """

    label: str

    @abstractmethod
    def takes(self, run: Run) -> bool:
        """Whether it computes the next step of a run."""

    def group(self, run: Run) -> Hashable:
        """A key for runs whose next step it takes; those with different keys do not share a call."""
        return None

    def conditioning_key(self, request: Request) -> Hashable:
        """A key of what :meth:`condition` adds for a request: equal keys and conditioning give equal tensors.

        ``None`` means that it adds nothing.
        """
        return None

    def condition(self, request: Request, conditioning: Conditioning) -> Mapping[str, Array]:
        """Compute the stepper's own conditioning for one prompt, a row each; it is cached with the denoiser's.

        Args:
            request: The request.
            conditioning: The denoiser's own inputs by name, a row a text.

        Raises:
            EngineError: if an engine fails.
        """
        return {}

    def begin(self, run: Run, control_images: Sequence[NDArray[np.uint8]]) -> None:  # noqa: B027 - most compute nothing
        """Compute once, before a run's first step, what its steps share.

        Args:
            run: The run.
            control_images: The images of the request's ControlNets, each ``[h, w, 3]``.

        Raises:
            EngineError: if an engine fails.
        """

    @abstractmethod
    def step(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> Floats:
        """Compute a step of shares of one group, on the host.

        Args:
            shares: The images that the call advances.
            feeds: Inputs of the denoiser's graph: its step in the fused loop, the whole denoiser in the plain one.

        Returns:
            float32: new registers in the fused loop, the prediction of every row in the plain one.

        Raises:
            EngineError: if the engine fails, or computes values that are not finite.
        """

    @abstractmethod
    def step_on_device(
        self, share: Share, changing: Mapping[str, Array], constant: Callable[[], Mapping[str, Array]]
    ) -> Array:
        """Compute a step of one whole run of the fused loop, whose state stays on a device.

        Args:
            share: The whole run.
            changing: Inputs of the denoiser's step that every step has anew.
            constant: Makes its other inputs, which are bound; it is called only if they are not bound yet.

        Returns:
            New registers, on the device.

        Raises:
            EngineError: if the engine fails.
        """


class EngineStepper(Stepper):
    """A stepper with one engine, which takes the denoiser's inputs and maybe more.

    Args:
        label: What messages call the engine.
        output: The output that is the step's result, one of :data:`OUTPUTS`.
    """

    def __init__(self, label: str, output: str) -> None:
        self.label, self._output = label, output

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """The opened engine."""

    def extra(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Inputs of the engine besides the denoiser's; arguments as of :meth:`Stepper.step`."""
        return {}

    def extra_on_device(self, share: Share, changing: Mapping[str, Array]) -> Mapping[str, Array]:
        """Inputs of the engine besides the denoiser's; arguments as of :meth:`Stepper.step_on_device`."""
        return {}

    def step(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> Floats:
        """Call the engine."""
        if extra := self.extra(shares, feeds):
            feeds = {**feeds, **extra}
        return output_of(self.engine, self.label, self._output, feeds)

    def step_on_device(
        self, share: Share, changing: Mapping[str, Array], constant: Callable[[], Mapping[str, Array]]
    ) -> Array:
        """Call the engine with what changes; all else is bound once."""
        engine = self.engine
        bound = bound_to(engine, share.run, constant)
        feeds = {name: values for name, values in changing.items() if name not in bound}
        feeds.update(self.extra_on_device(share, changing))
        return output_named(engine.run(cast_feeds(engine, feeds)), self.label, self._output)


class DenoiserStepper(EngineStepper):
    """The denoiser itself, whole or its fused step; it takes every step that no other stepper takes.

    Args:
        engine: The opened engine.
        label: What messages call it.
        output: The output that is the step's result.
    """

    def __init__(self, engine: Engine, label: str, output: str) -> None:
        super().__init__(label, output)
        self._engine = engine

    @property
    def engine(self) -> Engine:
        """The opened engine."""
        return self._engine

    def takes(self, run: Run) -> bool:
        """Every step."""
        return True

    def step(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> Floats:
        """Call the engine; it takes nothing else."""
        return output_of(self._engine, self.label, self._output, feeds)


def group_by_stepper(shares: Sequence[Share], steppers: Sequence[Stepper]) -> list[tuple[Stepper, list[Share]]]:
    """Shares of one call, split into calls that one stepper can make, in the order of their first shares.

    Args:
        shares: The shares.
        steppers: Those of the loop; the first that takes a run's next step gets its shares. The last takes all.
    """
    if len(shares) == 1:  # the most common call, with nothing to group
        return [(_stepper_of(shares[0].run, steppers), list(shares))]
    found: dict[tuple[Stepper, Hashable], list[Share]] = {}
    for share in shares:
        stepper = _stepper_of(share.run, steppers)
        found.setdefault((stepper, stepper.group(share.run)), []).append(share)
    return [(stepper, together) for (stepper, _), together in found.items()]


def _stepper_of(run: Run, steppers: Sequence[Stepper]) -> Stepper:
    for stepper in steppers[:-1]:
        if stepper.takes(run):
            return stepper
    return steppers[-1]
