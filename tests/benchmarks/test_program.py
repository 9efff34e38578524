"""Parts that programs share, and modules such as ``checkpoint`` that keep a program's earlier name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from latentrt.benchmarks.program import at_least, make_parser, write_json

MOVED = {
    "against_torch": "studies.against_torch",
    "build_sd15_unet": "studies.build_sd15_unet",
    "checkpoint": "checkpoints.write",
    "gpu_check": "studies.gpu_check",
    "host_time": "studies.host_time",
    "loadgen": "mlperf.loadgen",
    "lora_switch": "studies.lora_switch",
    "step_time": "studies.step_time",
    "winograd": "studies.winograd",
}


@pytest.mark.parametrize("earlier", MOVED)
def test_an_earlier_name_runs_the_program(earlier: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the same function, and its help names the new module."""
    main = importlib.import_module(f"latentrt.benchmarks.{earlier}").main
    assert main is importlib.import_module(f"latentrt.benchmarks.{MOVED[earlier]}").main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out.split()[:4] == ["usage:", "python", "-m", f"latentrt.benchmarks.{MOVED[earlier]}"]


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
