"""Parts that programs share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentrt.benchmarks.program import at_least, make_parser, write_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "the value is 0, expected 1 to 8"),
        ("9", "the value is 9, expected 1 to 8"),
        ("two", "the value is 'two', expected a whole number"),
    ],
)
def test_a_number_out_of_range_is_an_error_of_the_command_line(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says what was received and what was expected."""
    parser = make_parser("studies.some", "Do something.\n\nAnd more.")
    parser.add_argument("--count", type=at_least(1, 8))
    assert parser.parse_args(["--count", "8"]).count == 8
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--count", text])
    assert f"argument --count: {message}" in capsys.readouterr().err


def test_a_report_is_written_where_a_file_is_named(tmp_path: Path) -> None:
    """Without a file nothing is written."""
    write_json(None, {"a": 1})
    write_json(tmp_path / "report.json", {"a": 1})
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 1}
