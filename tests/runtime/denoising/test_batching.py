"""The images of several runs in calls of the denoiser: which share one, and each gets the image it gets alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines import Array
from latentrt.runtime import Pipeline
from latentrt.runtime.denoising.batching import Share, joined, split_into_calls
from latentrt.runtime.denoising.latent_preparation import start_run
from latentrt.runtime.denoising.run import Run
from latentrt.runtime.request.request import Request
from latentrt.runtime.samplers import compile_plan

MIX: list[dict[str, Any]] = [
    {"prompt": "a red apple", "sampler": "unipc", "steps": 6, "guidance": 4.0, "seed": 1, "images": 2},
    {"prompt": "a rocket", "sampler": "euler-a", "steps": 3, "guidance": 1.0, "seed": 2},
    {"prompt": "a green leaf", "sampler": "ddim", "steps": 4, "guidance": 7.5, "guidance_end": 0.5, "seed": 3},
    {"prompt": "a cat", "sampler": "pndm", "steps": 3, "guidance": 3.0, "guidance_rescale": 0.7, "seed": 4},
]
"""Requests with 5, 1, 1 and 4 registers; guided throughout, never, for a while, and rescaled."""


def test_a_mixed_batch_gives_each_request_its_own_picture(looped: Pipeline) -> None:
    """Requests of different samplers, steps, guidance and pictures share calls, join late and leave early."""
    alone = [looped(**options) for options in MIX]
    runs = [looped.start(**options) for options in MIX[:2]]
    looped.advance(runs)
    runs += [looped.start(**options) for options in MIX[2:]]
    while running := [run for run in runs if not run.done]:
        looped.advance(running)
    for run, expected in zip(runs, alone, strict=True):
        np.testing.assert_allclose(run.latents, expected.latents, atol=1e-4)
        assert int(np.abs(looped.finish(run).astype(int) - expected.images).max()) <= 1


def test_a_batch_is_one_call(tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the denoiser are those that guidance asks for: two a picture with it, one without."""
    with Pipeline.load(tiny_bundles["sd1"], threads=1) as pipe:
        step = pipe.engines["unet_step"]
        rows: list[int] = []
        run = step.run

        def count(feeds: Mapping[str, Array]) -> dict[str, Array]:
            rows.append(len(feeds["rows"]))
            return run(feeds)

        monkeypatch.setattr(step, "run", count)
        pipe.advance([pipe.start(**options) for options in MIX])
    assert rows == [2 * 2 + 1 + 2 + 2]


def begun(images: int, length: int = 3, guidance: float = 5.0) -> Run:
    """A run before its first step, whose texts have a number of tokens."""
    asked = Request("p", "n", 4, guidance, 7, "euler", 48, 32, images, 0)
    plan = compile_plan("euler", {"_class_name": "EulerDiscreteScheduler"}, 4)
    texts = [{"text": np.full((1, length), value, np.float32)} for value in (range(2) if asked.guided else [1])]
    return start_run(asked, plan, texts, (images, 4, 4, 6))


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ((2, 1), None, [[(0, 0, 2), (1, 0, 1)]]),
        ((5,), 2, [[(0, 0, 2)], [(0, 2, 4)], [(0, 4, 5)]]),
        ((1, 3, 1), 2, [[(0, 0, 1), (1, 0, 1)], [(1, 1, 3)], [(2, 0, 1)]]),
        ((2, 2), 2, [[(0, 0, 2)], [(1, 0, 2)]]),
    ],
)
def test_images_fill_calls_in_order(
    counts: tuple[int, ...], most: int | None, expected: list[list[tuple[int, int, int]]]
) -> None:
    """No call has more images than it may, and none has room that the next image could take."""
    runs = [begun(count) for count in counts]
    calls = split_into_calls(runs, most)
    assert [[(runs.index(share.run), share.first, share.last) for share in call] for call in calls] == expected


def test_texts_of_other_lengths_begin_a_call() -> None:
    """Conditioning that cannot be concatenated does not share a call."""
    runs = [begun(1, 3), begun(1, 3), begun(1, 5), begun(1, 3)]
    assert [len(call) for call in split_into_calls(runs, None)] == [2, 1, 1]


def test_the_rows_of_a_share() -> None:
    """With guidance each sample has two rows, the unconditional half first; conditioning and noise are cut alike."""
    share = Share(begun(3), 1, 3)
    assert (len(share), share.whole) == (2, False)
    assert share.rows(4).tolist() == [4, 5, 4, 5]
    np.testing.assert_array_equal(share.conditioning_rows()["text"][:, 0], [0, 0, 1, 1])
    assert share.noise() is None
    alone = Share(begun(2, guidance=1.0), 0, 2)
    assert (alone.whole, alone.rows().tolist()) == (True, [0, 1])
    np.testing.assert_array_equal(alone.conditioning_rows()["text"][:, 0], [1, 1])


def test_a_single_part_is_not_copied() -> None:
    """Several parts are concatenated by name."""
    one, other = {"a": np.zeros((1, 2))}, {"a": np.ones((2, 2))}
    assert joined([one])["a"] is one["a"]
    np.testing.assert_array_equal(joined([one, other])["a"], [[0, 0], [1, 1], [1, 1]])
