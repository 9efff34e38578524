"""The denoising loop around engine calls: what its two ways to take a step have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array
from latentrt.engines.errors import InvalidRequestError

from ..engine_calls import Conditioning, Floats
from ..request.request import Request
from ..samplers.plan import Plan
from .batching import Share, split_into_calls
from .run import Run
from .steppers import Stepper, group_by_stepper

Call: TypeAlias = tuple[Stepper, list[Share]]
"""One call: the stepper that makes it, and the images that it advances."""


class Loop(ABC):
    """Advances runs with the engines of one denoiser. Serves many threads; a run belongs to one.

    Args:
        denoiser: The stepper of the denoiser itself.
        max_batch: Most images of one call of the denoiser; ``None`` sets no limit.

    Attributes:
        max_batch: Most images of one call.
        steppers: Steppers in the order in which they are asked whether they take a run's next step; the denoiser's own
            is the last.
    """

    name: str
    """Its name where a pipeline is loaded."""
    prompt_inputs: frozenset[str] = frozenset()
    """Conditioning from which :meth:`condition` computes more; it passes on all other as it is."""

    def __init__(self, denoiser: Stepper, max_batch: int | None = None) -> None:
        self.max_batch = max_batch
        self.steppers: tuple[Stepper, ...] = (denoiser,)

    def add_stepper(self, stepper: Stepper) -> None:
        """Ask a stepper before all that there are whether it takes a run's next step."""
        self.steppers = (stepper, *self.steppers)

    @abstractmethod
    def condition(self, conditioning: Conditioning) -> dict[str, Array]:
        """The conditioning that the denoiser's steps need: all that does not depend on the latents is computed.

        Args:
            conditioning: The denoiser's own inputs by name, a row a text.

        Raises:
            BundleError: if the steps need more than that.
            EngineError: if an engine fails.
        """

    def condition_for(self, request: Request, conditioning: Conditioning) -> dict[str, Array]:
        """As :meth:`condition`, together with what the other steppers need for a request."""
        found = self.condition(conditioning)
        for stepper in self.steppers:
            found |= stepper.condition(request, conditioning)
        return found

    def check(self, plan: Plan) -> None:  # noqa: B027 - most loops take every plan
        """Refuse a plan that the denoiser cannot follow.

        Raises:
            InvalidRequestError: saying why.
        """

    @abstractmethod
    def begin(self, run: Run) -> None:
        """Compute once what depends on the run's timesteps alone."""

    def begin_with(self, run: Run, control_images: Sequence[NDArray[np.uint8]] = ()) -> None:
        """As :meth:`begin`, together with what the steppers compute once; the run then is this loop's.

        Args:
            run: The run.
            control_images: The images of the request's ControlNets, each ``[h, w, 3]``.
        """
        run.loop = self
        self.begin(run)
        for stepper in self.steppers:
            stepper.begin(run, control_images)

    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run a step further, with one call of the denoiser for all, or as few as :attr:`max_batch` allows.

        The runs may differ in sampler, number and index of their steps, guidance and images, but not in size.

        Raises:
            InvalidRequestError: if a run is done, is there twice, or has another size than the others.
            EngineError: if an engine fails, or computes values that are not finite; no run has moved then.
        """
        check_together(runs)
        calls: list[Call] = []
        for shares in split_into_calls(runs, self.max_batch):
            for stepper, together in group_by_stepper(shares, self.steppers):
                calls += self._calls(stepper, together)
        self._take_step(calls)
        for run in runs:
            if run.begun is not None and run.begun.kept is not None:
                run.registers = run.begun.kept.restore(run.plan, run.index, run.registers)

    def _calls(self, stepper: Stepper, shares: list[Share]) -> list[Call]:
        """The calls that shares of one group take: one, unless the loop has to split them further."""
        return [(stepper, shares)]

    def _take_step(self, calls: Sequence[Call]) -> None:
        """Make all calls, and move all runs at once after the last."""
        new: dict[Run, list[Floats]] = {}
        for stepper, shares in calls:
            for share, registers in zip(shares, self._computed(stepper, shares), strict=True):
                new.setdefault(share.run, []).append(registers)
        for run, parts in new.items():
            run.registers = parts[0] if len(parts) == 1 else np.concatenate(parts)
            run.index += 1

    @abstractmethod
    def _computed(self, stepper: Stepper, shares: Sequence[Share]) -> list[Floats]:
        """New registers of each share, from one call."""


def check_together(runs: Sequence[Run]) -> None:
    """Refuse runs that cannot be advanced together.

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
            one, other = runs[0], run
            sizes = [f"{each.request.width}x{each.request.height}" for each in (one, other)]
            if sizes[0] != sizes[1]:
                raise InvalidRequestError(f"runs of {sizes[0]} and of {sizes[1]} pixels cannot share a batch")
            shapes = [list(each.latent_shape[1:]) for each in (one, other)]
            raise InvalidRequestError(f"runs of latents {shapes[0]} and {shapes[1]} cannot share a batch")
