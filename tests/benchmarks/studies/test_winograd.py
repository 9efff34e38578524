"""Timing of convolutions by tiles, on layers that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentrt.benchmarks.studies.winograd import main


def test_every_sample_is_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers run with each tile, and their results are those of plain convolutions."""
    path = tmp_path / "report.json"
    options = ["--precision", "fp32", "--case", "4,6,9,2", "--case", "8,8,4,1", "--rounds", "3", "--json", str(path)]
    assert main(options) == 0
    layers = json.loads(path.read_text())["layers"]
    assert [each["case"] for each in layers] == ["2x4x9x9 to 6", "1x8x4x4 to 8"]
    for layer in layers:
        assert list(layer["tiles"]) == ["0", "2", "4"]
        assert all(len(tile["seconds"]) == 3 and tile["error"] < 1e-5 for tile in layer["tiles"].values())
        assert layer["tiles"]["0"]["error"] == 0
        assert layer["tiles"]["4"]["error"] > 0
    assert "| 2x4x9x9 to 6 | fp32 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "the value is 0, expected 1 or more"),
        (["--case", "4,6,9"], "takes four numbers"),
        (["--case", "4,6,nine,1"], "takes four numbers"),
        (["--case", "4,6,0,1"], "--case takes numbers from 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence says what is wrong."""
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err
