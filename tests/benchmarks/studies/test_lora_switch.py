"""The benchmark of switching LoRAs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.studies.lora_switch import main


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_it_times_switches_and_steps(tiny: Any, capsys: pytest.CaptureFixture[str], layers: str) -> None:
    """Both ways to switch, to each LoRA and to none, as often as asked for; and what a step costs in both."""
    bundle = str(tiny.bundle("sd1"))
    assert main([bundle, "--layers", layers, "--width", "32", "--height", "24", "--rounds", "2"]) == 0
    *switches, step = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in switches] == [
        f"{mode}, to {name}" for mode in ("anew", "switchable") for name in ("A", "B", "none")
    ]
    assert all(re.fullmatch(r"[a-zA-Z, ]+: \d+\.\d\d, \d+\.\d\d s", line) for line in switches)
    assert re.fullmatch(r"a step: \S+ s anew, \S+ s switchable, median of ratios \d\.\d{3}", step)


def test_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is one sentence."""
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
