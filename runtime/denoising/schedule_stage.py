"""The schedule stage: everything that depends on a run's timesteps alone, computed before the first step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from latentrt.engines import Array, Engine

from ..engine_calls import cast_feeds, to_host
from .batching import joined
from .run import Run

TIMESTEPS_AT_ONCE = 64
"""Most rows of one call of a schedule stage."""


def schedule_table(schedule: Engine, run: Run) -> dict[str, Array]:
    """Run a schedule stage on all timesteps of a run.

    A stage with vectors of the conditioning as inputs gives one result for each prompt, the unconditional one included.

    Returns:
        By name ``[rows of the plan, 1 or prompts, ...]``, on the host.

    Raises:
        EngineError: if the engine fails.
    """
    vectors = [name for name in schedule.inputs if name != "timestep"]
    texts = run.conditioning if vectors else run.conditioning[-1:]
    feeds: dict[str, Array] = {"timestep": np.repeat(run.plan.timesteps, len(texts))}
    for name in vectors:
        feeds[name] = np.concatenate([text[name] for text in texts] * len(run))
    feeds = cast_feeds(schedule, feeds)
    table = joined(
        to_host(schedule.run({name: values[first : first + TIMESTEPS_AT_ONCE] for name, values in feeds.items()}))
        for first in range(0, len(feeds["timestep"]), TIMESTEPS_AT_ONCE)
    )
    return {name: values.reshape(len(run), len(texts), *values.shape[1:]) for name, values in table.items()}


def schedule_rows(run: Run, table: Mapping[str, Array], samples: int) -> dict[str, Array]:
    """The entries of a schedule stage's table for a run's next step, one row an image and half.

    Args:
        run: The run.
        table: The output of :func:`schedule_table`.
        samples: Number of images.
    """
    found: dict[str, Array] = {}
    for name, values in table.items():
        halves = values[run.index]  # one for all rows, or one for each text
        if len(halves) == 2 and not run.guided:
            halves = halves[1:]
        found[name] = halves if samples == 1 else np.repeat(halves, samples, axis=0)
    return found
