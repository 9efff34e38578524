"""Sharing between the halves of guidance: both come out as they did, from less work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.exporter.passes.guidance import share_guidance

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def test_guidance_shares_what_the_prompt_does_not_reach(
    parse: Parse, run: Run, denoiser: str, denoiser_feeds: dict[str, NDArray[np.float32]]
) -> None:
    """With two rows of text to a sample, latents and time keep one row, and both halves come out."""
    graph = parse(denoiser)
    both = {name: np.concatenate([denoiser_feeds[name], denoiser_feeds[name]]) for name in ("latents", "time")}
    text = np.arange(12, dtype=np.float32).reshape(4, 3) / 50
    expected = run(graph, {**both, "text": text})["out"]
    assert share_guidance(graph, conditioned=["text"]) == 6
    for rows in ([0, 1, 0, 1], [0, 1], [1, 0, 0]):
        picked = [2 * rows[:place].count(row) + row for place, row in enumerate(rows)]
        feeds = {**denoiser_feeds, "text": text[picked], "rows": np.array(rows)}
        np.testing.assert_allclose(run(graph, feeds)["out"], expected[picked], rtol=1e-6)


def test_a_shape_that_crosses_is_computed_again(
    parse: Parse, run: Run, denoiser_feeds: dict[str, NDArray[np.float32]]
) -> None:
    """A shape taken from the latents, batch included, is that of the repeated latents where the prompt is."""
    graph = parse(
        """
        denoiser (float[batch, 4] latents, float[batch, 4] text) => (float[batch, 2, 2] out)
            <int64[2] square = {2, 2}>
        {
            count = Shape<start = 0, end = 1>(latents)
            shape = Concat<axis = 0>(count, square)
            joined = Add(latents, text)
            out = Reshape(joined, shape)
        }
        """
    )
    latents, text = denoiser_feeds["latents"], np.arange(16, dtype=np.float32).reshape(4, 4)
    expected = run(graph, {"latents": np.concatenate([latents, latents]), "text": text})["out"]
    share_guidance(graph, conditioned=["text"])
    feeds = {"latents": latents, "text": text, "rows": np.array([0, 1, 0, 1])}
    np.testing.assert_array_equal(run(graph, feeds)["out"], expected)


def test_a_length_that_crosses_needs_no_values(
    parse: Parse, run: Run, denoiser_feeds: dict[str, NDArray[np.float32]]
) -> None:
    """The picture's own size, and the number of rows, are known without gathering what they are measured on."""
    graph = parse(
        """
        denoiser (float[batch, 4] latents, float[batch, 2, 2] text) => (float[batch, 2, 2] out)
            <int64[1] two = {2}, float[1] half = {0.5}>
        {
            wide = Mul(latents, half)
            count = Shape<start = 0, end = 1>(wide)
            width = Shape<start = 1, end = 2>(wide)
            side = Div(width, two)
            shape = Concat<axis = 0>(count, side, two)
            added = Add(text, half)
            out = Reshape(added, shape)
        }
        """
    )
    share_guidance(graph, conditioned=["text"])
    assert [node.op_type for node in graph].count("Gather") == 0
    text = np.arange(16, dtype=np.float32).reshape(4, 2, 2)
    feeds = {"latents": denoiser_feeds["latents"], "text": text, "rows": np.array([0, 1, 0, 1])}
    np.testing.assert_array_equal(run(graph, feeds)["out"], text + 0.5)


def test_what_a_branch_captures_does_not_cross(parse: Parse) -> None:
    """A branch that would see values with other rows than it was made for is refused by name."""
    graph = parse(
        """
        denoiser (float[batch, 4] latents, bool text) => (float[batch, 4] out) {
            seen = Neg(latents)
            out = If (text) <
                then_branch = yes () => (float[batch, 4] y) { y = Identity(seen) },
                else_branch = no () => (float[batch, 4] n) { n = Neg(seen) }
            >
        }
        """
    )
    with pytest.raises(ValueError, match="uses 'seen' from outside"):
        share_guidance(graph, conditioned=["text"])


def test_a_name_that_is_taken_is_refused(parse: Parse) -> None:
    """A graph whose own input is called rows is left alone."""
    graph = parse("denoiser (float[batch] rows, float[batch] text) => (float[batch] out) { out = Add(rows, text) }")
    with pytest.raises(ValueError, match="an input 'rows' already"):
        share_guidance(graph, conditioned=["text"])


def test_latents_that_meet_the_prompt_at_once_are_gathered(
    parse: Parse, run: Run, denoiser_feeds: dict[str, NDArray[np.float32]]
) -> None:
    """Where every node depends on the prompt nothing is shared, and the input itself crosses."""
    graph = parse(
        "denoiser (float[batch, 4] latents, float[batch, 4] text) => (float[batch, 4] out) { out = Add(latents, text) }"
    )
    assert share_guidance(graph, conditioned=["text"]) == 0
    text = np.zeros((3, 4), np.float32)
    rows = np.array([1, 0, 0])
    result = run(graph, {"latents": denoiser_feeds["latents"], "text": text, "rows": rows})["out"]
    np.testing.assert_array_equal(result, denoiser_feeds["latents"][rows])
