"""Engines around engines, by which a study watches the calls of a loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

from latentrt.engines import Array, Engine, TensorSpec
from latentrt.engines.device import to_numpy


class Wrapped:
    """An open engine that passes every call on to another one; subclasses watch :meth:`run`."""

    def __init__(self, engine: Engine) -> None:
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self._engine = engine

    def open(self) -> Self:
        """Return the engine, which is open already."""
        return self

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Bind constant inputs of the engine within."""
        self._engine.bind(feeds)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the engine within."""
        return self._engine.run(feeds)

    def close(self) -> None:
        """Close the engine within."""
        self._engine.close()


class Timed(Wrapped):
    """An engine whose runs are timed.

    Attributes:
        seconds: Total time of its runs; callers may reset it.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.seconds = 0.0

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the engine within, and add the time that it took."""
        begin = time.perf_counter()
        try:
            return super().run(feeds)
        finally:
            self.seconds += time.perf_counter() - begin


class Recorder(Wrapped):
    """An engine that copies all outputs to the host, and keeps the first run's inputs and outputs.

    Attributes:
        first: Inputs and outputs of the first run, by name; ``None`` before it.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.first: tuple[dict[str, Array], dict[str, Array]] | None = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the engine within; returns its outputs as numpy arrays."""
        outputs = {name: to_numpy(values) for name, values in super().run(feeds).items()}
        self.first = self.first or (dict(feeds), outputs)
        return outputs
