"""Words of a command line become values of a request's options, and words that are no values are refused."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.cli.request_arguments import add_request_arguments, options_of
from latentrt.runtime.request.control import Control
from latentrt.runtime.vae.tiling import Tiling


def read(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="latentrt")
    add_request_arguments(parser)
    return options_of(parser.parse_args(list(words)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), {}),
        (("--steps", "3", "--guidance", "4.5"), {"steps": 3, "guidance": 4.5}),
        (("--timesteps", "900,100.5"), {"timesteps": (900.0, 100.5)}),
        (("--original-size", "1024x768", "--crop", "0,64"), {"original_size": (1024, 768), "crop": (0, 64)}),
        (("--guess-mode",), {"guess_mode": True}),
        (("--vae-tile", "64"), {"vae_tiling": Tiling(64, None, "shift")}),
        (
            ("--vae-tile", "64", "--vae-tile-overlap", "8", "--vae-tile-edges", "cut"),
            {"vae_tiling": Tiling(64, 8, "cut")},
        ),
    ],
)
def test_words_become_values(words: tuple[str, ...], expected: dict[str, Any]) -> None:
    """What is not given is left out, so that the request's own defaults count."""
    assert read(*words) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("edges=a.png", Control("a.png", "edges")),
        ("edges=a.png:0.8", Control("a.png", "edges", 0.8)),
        ("edges=a.png:0.8:0.1:0.9", Control("a.png", "edges", 0.8, 0.1, 0.9)),
        ("edges=a:1.png", Control("a:1.png", "edges")),
        ("edges=c:a.png:0.5", Control("c:a.png", "edges", 0.5)),
        ("edges=a=b.png", Control("a=b.png", "edges")),
    ],
)
def test_a_controlnet_has_a_file_and_up_to_three_numbers(word: str, expected: Control) -> None:
    """Colons and equals signs of the file's name stay in it."""
    assert read("--control", word) == {"control": [expected]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--control", "edges"), "'edges' is not understood; expected NAME=FILE"),
        (("--control", "=a.png"), "'=a.png' is not understood; expected NAME=FILE"),
        (("--timesteps", "1,b"), "'1,b' is not understood; expected numbers between commas"),
        (("--crop", "-1,2"), "is not understood|expected one argument"),
        (("--original-size", "1024"), "'1024' is not understood; expected a width and a height as 1024x768"),
        (("--steps", "many"), "invalid int value: 'many'"),
        (("--safety", "maybe"), "invalid choice: 'maybe'"),
    ],
)
def test_words_that_are_no_values_are_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the word and what is expected."""
    with pytest.raises(SystemExit):
        read(*words)
    assert re.search(message, capsys.readouterr().err)


def test_tiles_need_a_size() -> None:
    """An overlap alone asks for nothing."""
    with pytest.raises(InvalidRequestError, match="tiles are described but not asked for; give their size"):
        read("--vae-tile-overlap", "8")
