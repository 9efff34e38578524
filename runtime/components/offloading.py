"""Components that take turns in memory: each is opened when it is called, and closed when another one is."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Mapping

from latentrt.engines import Array, Engine, TensorSpec
from latentrt.engines.base import BaseEngine
from latentrt.engines.device import to_numpy

from ..bundle.manifest import Graph


class Offloader:
    """At most one engine is open at a time. Safe from many threads, which wait for each other."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: Engine | None = None

    def run(self, engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Open an engine, unless it is, and run it; it stays open for its next call.

        What comes out is on the host: an engine's device memory may go when the next one has its turn.
        """
        with self._lock:
            if self._open is not engine:
                self.rest()
                engine.open()
                self._open = engine
            try:
                return {name: to_numpy(values) for name, values in engine.run(feeds).items()}
            except BaseException:
                self.rest()
                raise

    def rest(self, engine: Engine | None = None) -> None:
        """Close the engine that is open.

        Args:
            engine: The only one to close; ``None`` closes whichever it is.
        """
        with self._lock:
            if self._open is not None and engine in (None, self._open):
                last, self._open = self._open, None
                last.close()
                trim_memory()


class OffloadedEngine(BaseEngine):
    """An engine that is opened for its turn only.

    ``open`` opens nothing yet, and tells inputs and outputs from the manifest.

    Args:
        engine: The engine, not opened.
        graph: What it computes.
        turns: Shared by all engines of which one may be open at a time.
        label: What messages call it.
    """

    def __init__(self, engine: Engine, graph: Graph, turns: Offloader, label: str) -> None:
        super().__init__(getattr(engine, "label", label))
        self._engine, self._graph, self._turns = engine, graph, turns

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        inputs, outputs = ({spec.name: spec for spec in specs} for specs in (self._graph.inputs, self._graph.outputs))
        return inputs, outputs

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        return self._turns.run(self._engine, feeds)

    def _close(self) -> None:
        self._turns.rest(self._engine)


def trim_memory() -> None:
    """Hand freed memory back to the system: glibc keeps blocks of up to 32 MiB, and weights are full of them."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
