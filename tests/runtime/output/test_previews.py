"""Previews come after every so many steps, never after the last, and their options are checked."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.output.previews import PREVIEW_EVERY, Preview, Previews, take_previews
from latentrt.runtime.output.result import StepInfo


def steps(total: int, closed: list[int]) -> Generator[StepInfo, None, str]:
    """Steps that tell when they are closed, and a result."""
    try:
        for index in range(total):
            yield StepInfo(index, total, 0.0, 0.0, np.full((1, 1, 4, 2, 2), index, np.float32))
    finally:
        closed.append(1)
    return "the result"


def draw(step: StepInfo) -> Any:
    return np.full((1, 4, 4, 3), step.latents.max(), np.uint8)


@pytest.mark.parametrize(("every", "shown"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (6, []), (9, [])])
def test_previews_follow_their_steps(every: int, shown: list[int]) -> None:
    """All steps come through, and so does the result, which follows the last step in a preview's place."""
    seen: list[Preview] = []
    closed: list[int] = []
    stream = Previews(seen.append, every).of(steps(6, closed), draw)
    assert [next(stream).index for _ in range(6)] == list(range(6))
    with pytest.raises(StopIteration) as stop:
        next(stream)
    assert stop.value.value == "the result"
    assert [(each.index, each.total, int(each.images.max())) for each in seen] == [(index, 6, index) for index in shown]


def test_closing_closes_the_steps() -> None:
    """A request that nobody reads any more is cancelled."""
    closed: list[int] = []
    stream = Previews(lambda preview: None, 1).of(steps(6, closed), draw)
    next(stream)
    assert closed == []
    stream.close()
    assert closed == [1]


def test_options_are_taken_from_the_others() -> None:
    """Without a function there are no previews; the number of steps between two has a default."""
    seen: list[Preview] = []
    assert take_previews({"steps": 3}) == ({"steps": 3}, None)
    assert take_previews({"on_preview": None, "preview_every": None}) == ({}, None)
    for given, every in ((None, PREVIEW_EVERY), (2, 2)):
        rest, previews = take_previews({"steps": 3, "on_preview": seen.append, "preview_every": given})
        assert rest == {"steps": 3}
        assert previews == Previews(seen.append, every)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_preview": 3}, "on_preview is a int, expected a function"),
        ({"preview_every": 2}, "preview_every is given without on_preview"),
        ({"on_preview": print, "preview_every": 0}, "preview_every is 0"),
        ({"on_preview": print, "preview_every": 1.5}, "preview_every is 1.5"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """The sentence names the option."""
    with pytest.raises(InvalidRequestError, match=message):
        take_previews(options)
