"""Inputs that stay the same are bound to an engine once, for one run, one state of guidance and one thread."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from latentrt.engines import Array, FakeEngine, TensorSpec
from latentrt.runtime.denoising.binding import bound_to
from latentrt.runtime.denoising.run import Run


class Watched(FakeEngine):
    """An engine that records what is bound to it."""

    def __init__(self) -> None:
        super().__init__([TensorSpec("scale", "float16", ("batch",))], [], lambda feeds: {})
        self.bound: list[dict[str, Array]] = []

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Record the inputs."""
        self.bound.append(dict(feeds))


def constant() -> dict[str, Array]:
    return {"scale": np.ones(1, np.float32)}


class AnyRun(SimpleNamespace):
    """A run, as far as binding looks at it."""


def run(guided: bool = True) -> Any:
    return cast(Run, AnyRun(guided=guided))


def test_a_run_binds_once_until_guidance_changes() -> None:
    """The values are cast to what the engine takes, and the names are those that were bound."""
    engine, asked = Watched().open(), run()
    assert [bound_to(engine, asked, constant) for _ in range(3)] == [frozenset({"scale"})] * 3
    (first,) = engine.bound
    assert first["scale"].dtype == np.float16
    asked.guided = False
    bound_to(engine, asked, constant)
    assert len(engine.bound) == 2


def test_runs_and_engines_in_turn_bind_anew() -> None:
    """What an engine holds of one run is of no use to the next, nor to another engine."""
    one, other = Watched().open(), Watched().open()
    first, second = run(), run()
    for asked in (first, second, first):
        bound_to(one, asked, constant)
    bound_to(other, first, constant)
    bound_to(one, first, constant)
    assert (len(one.bound), len(other.bound)) == (3, 1)


def test_each_thread_binds_for_itself() -> None:
    """Engines keep bound inputs by thread."""
    engine, asked = Watched().open(), run()
    bound_to(engine, asked, constant)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(bound_to, engine, asked, constant).result()
    bound_to(engine, asked, constant)
    assert len(engine.bound) == 2


def test_bound_inputs_do_not_keep_a_run() -> None:
    """A run that its owner drops is freed."""
    engine, asked = Watched().open(), run()
    bound_to(engine, asked, constant)
    watched = weakref.ref(asked)
    del asked
    gc.collect()
    assert watched() is None
