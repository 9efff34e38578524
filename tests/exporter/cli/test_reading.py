"""Command-line options for settings that a source does not have itself."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.exporter.cli.reading import add_reading, reading
from latentrt.exporter.source.opening import Reading


def parsed(*arguments: str) -> Reading:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_reading(parser)
    return reading(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), Reading()),
        (("--config", "a"), Reading(config=Path("a"))),
        (("--tokenizer", "b"), Reading(tokenizer=Path("b"))),
        (("--prediction", "v_prediction"), Reading(prediction="v_prediction")),
        (("--variant", "fp16", "--revision", "v1"), Reading(variant="fp16", revision="v1")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and value else None,
)
def test_each_option_is_a_setting(arguments: tuple[str, ...], expected: Reading) -> None:
    """An option sets the field of its name, and leaves the others at their defaults."""
    assert parsed(*arguments) == expected


def test_settings_are_checked_when_they_are_read() -> None:
    """An unknown prediction, and options that exclude each other, are refused."""
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'guess'"):
        parsed("--prediction", "guess")
    with pytest.raises(InvalidRequestError, match="not both"):
        parsed("--config", "a", "--tokenizer", "b")
