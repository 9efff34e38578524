"""The denoising loop around engine calls: the two ways to take runs a step further."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines import Array
from latentrt.engines.errors import InvalidRequestError

from ..engine_calls import Conditioning as Conditioning
from ..engine_calls import Floats as Floats
from ..samplers.plan import Plan
from .batching import Share
from .latent_preparation import start_run as start_run
from .run import Run as Run

if TYPE_CHECKING:
    from .controlnets import ControlNets


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
