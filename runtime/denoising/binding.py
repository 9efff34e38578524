"""Inputs that stay the same from step to step are bound to an engine once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from latentrt.engines import Array, Engine

from ..engine_calls import cast_feeds
from .run import Run


@dataclass(frozen=True)
class _Bound:
    """The inputs that an engine holds. The run is referenced weakly: a run that its owner drops must be freed."""

    run: weakref.ref[Run]
    guided: bool
    names: frozenset[str]


_local = threading.local()  # bound inputs belong to a thread and an engine, whichever loop bound them


def bound_to(engine: Engine, run: Run, constant: Callable[[], Mapping[str, Array]]) -> frozenset[str]:
    """Bind the inputs that all steps of a run share to an engine, unless they are bound already.

    Args:
        engine: The engine.
        run: The run.
        constant: Makes these inputs, which stay the same as long as guidance is on or off.

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
