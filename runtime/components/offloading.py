"""Offloading: each component is opened when it is called, and closed when another one is called."""

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
        """Run an engine. It is opened first if it is not open, and stays open for the next call.

        Args:
            engine: The engine.
            feeds: Inputs by name.

        Returns:
            Outputs by name, on the host: an engine's device memory may be freed when another engine runs.

        Raises:
            EngineError: if the engine does not open or fails.
        """
        with self._lock:
            if self._open is not engine:
                self.release()
                engine.open()
                self._open = engine
            try:
                return {name: to_numpy(values) for name, values in engine.run(feeds).items()}
            except BaseException:
                self.release()
                raise

    def release(self, engine: Engine | None = None) -> None:
        """Close the open engine, and return its memory to the system.

        Args:
            engine: The engine to close if it is the open one; ``None`` closes whichever is open.
        """
        with self._lock:
            if self._open is not None and engine in (None, self._open):
                last, self._open = self._open, None
                last.close()
                trim_memory()


class OffloadedEngine(BaseEngine):
    """An engine that is open only while it is the one in use.

    ``open`` opens nothing yet; inputs and outputs are those of the manifest.

    Args:
        engine: The engine, not opened.
        graph: The graph that it computes.
        offloader: Shared by all engines of which one may be open at a time.
        label: Its name in messages.
    """

    def __init__(self, engine: Engine, graph: Graph, offloader: Offloader, label: str) -> None:
        super().__init__(getattr(engine, "label", label))
        self._engine, self._graph, self._offloader = engine, graph, offloader

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        inputs, outputs = ({spec.name: spec for spec in specs} for specs in (self._graph.inputs, self._graph.outputs))
        return inputs, outputs

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        return self._offloader.run(self._engine, feeds)

    def _close(self) -> None:
        self._offloader.release(self._engine)


def trim_memory() -> None:
    """Return freed memory to the system: glibc keeps blocks of up to 32 MiB, and many weights are smaller."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
