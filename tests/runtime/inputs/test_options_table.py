"""The manual's table of options says of each what its declaration says, and the script prints that table."""

from __future__ import annotations

import runpy

import pytest

from latentrt.runtime.families import FAMILIES
from latentrt.runtime.inputs.options_table import families_with, options_table
from latentrt.runtime.request.options import OPTIONS, SAFETY


def row(name: str) -> list[str]:
    (line,) = (line for line in options_table().splitlines() if line.startswith(f"| `{name}` |"))
    return line.strip("| ").split(" | ")


def test_rows_are_those_of_the_declarations() -> None:
    """Choices are listed as words, bounds stand with the kind of value, and what an option needs is named."""
    assert row("safety")[1] == ", ".join(f"`{word}`" for word in SAFETY)
    assert row("seed")[1].endswith("0 to 2**64 - 1")
    assert row("mask")[4].endswith("Goes with `image`.")
    assert row("guidance_rescale")[2] == "0"
    for name, option in OPTIONS.items():
        meaning = row(name)[4]
        assert meaning[0].isupper() or not meaning[0].isalpha()
        assert meaning[1:].startswith(option.help[1:])
        assert meaning.endswith(".")


def test_families_are_named_where_some_lack_an_option() -> None:
    """An option of all families says so."""
    assert families_with(OPTIONS["steps"]) == "all"
    for name in ("prompt_3", "aesthetic_score"):
        named = {word.strip("`") for word in families_with(OPTIONS[name]).split(", ")}
        assert named == {each for each, family in FAMILIES.items() if name in family.options}


def test_the_script_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Run as a module it writes the table and nothing else."""
    with pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("latentrt.runtime.inputs.options_table", run_name="__main__")
    assert capsys.readouterr().out == options_table()
