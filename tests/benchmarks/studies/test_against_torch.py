"""Engines beside diffusers, on models of which a step takes milliseconds."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from latentrt.benchmarks.studies import against_torch
from latentrt.benchmarks.studies.against_torch import main


@pytest.mark.heavy
@pytest.mark.parametrize("part", ["step", "decoder"])
def test_both_take_the_same_steps(
    part: str,
    tiny_bundles: dict[str, Path],
    tiny_sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every sample is in the report, with ratios taken in pairs; results are those of diffusers."""
    quick = functools.partial(against_torch.measure_ceilings, seconds=0.05, sizes=(64,), copied=1 << 16)
    monkeypatch.setattr(against_torch, "measure_ceilings", quick)
    monkeypatch.setattr(against_torch, "_REST", 0)
    report_file = tmp_path / "report.json"
    engines = ["--engine", "openvino:fp32", "--engine", "onnxruntime:fp32", "--engine", "openvino:fp32:plain"]
    options = ["--part", part, "--size", "32", "--rounds", "3", "--json", str(report_file)]
    assert main([str(tiny_bundles["sd1"]), "--source", str(tiny_sources["sd1"]), *engines, *options]) == 0
    report = json.loads(report_file.read_text())
    rows = report["contenders"]
    assert list(rows) == [
        "LatentRT, openvino fp32",
        "LatentRT, onnxruntime fp32",
        "LatentRT, openvino fp32, plain convolutions",
        "diffusers fp32",
        "diffusers bf16",
    ]
    assert all(len(row["seconds"]) == 3 for row in rows.values())
    assert all(rows[name]["difference"] < 1e-4 for name in list(rows)[:3])
    assert 1e-4 < rows["diffusers bf16"]["difference"] < 0.2
    ours, theirs = rows["LatentRT, openvino fp32"], rows["diffusers fp32"]["seconds"]
    ratios = sorted(slow / fast for slow, fast in zip(theirs, ours["seconds"], strict=True))
    assert ours["over"]["diffusers fp32"]["median"] == pytest.approx(ratios[1])
    assert "GFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "the value is 0, expected 1 or more"),
        (["--engine", "openvino"], "takes an engine and a precision"),
        (["--engine", "openvino:fp32:fast"], "takes an engine and a precision"),
        (["--source", "emoji"], "was not built from"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    options: list[str],
    message: str,
    tiny_bundles: dict[str, Path],
    tiny_sources: dict[str, Path],
    emoji_source: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Zero rounds, an engine without a precision, and a bundle of another model are errors of the command line."""
    options = [str(emoji_source) if option == "emoji" else option for option in options]
    with pytest.raises(SystemExit, match="2"):
        main([str(tiny_bundles["sd1"]), "--source", str(tiny_sources["sd1"]), *options])
    assert message in capsys.readouterr().err
