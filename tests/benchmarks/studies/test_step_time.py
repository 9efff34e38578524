"""The benchmark of a step with ``wrapped`` engines, on models of which a step takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentrt.benchmarks.studies.step_time import main


@pytest.mark.heavy
def test_both_loops_are_timed_and_agree(
    tiny_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report has every sample, the host's share within each, and loops that compute the same."""
    report_file = tmp_path / "report.json"
    assert main([str(tiny_bundles["sd1"]), "--rounds", "3", "--images", "2", "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["latents"] == [2, 4, 16, 16]
    for samples in report["samples"].values():
        assert len(samples["step"]) == len(samples["host"]) == 3
        assert all(0 < host < step for host, step in zip(samples["host"], samples["step"], strict=True))
    assert report["relative_difference"] < 1e-5
    assert report["stages"]["unet_prompt"]["outputs"] == 8
    assert report["stages"]["unet_step"]["nodes"] < report["stages"]["unet"]["nodes"]
    assert "| fused |" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--rounds", "--images"])
def test_nothing_to_measure_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero rounds or pictures are an error of the command line."""
    with pytest.raises(SystemExit, match="2"):
        main(["bundle", flag, "0"])
    assert "expected 1 or more" in capsys.readouterr().err


def test_a_bundle_without_stages_is_refused(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names what is missing."""
    manifest = json.loads((tiny_bundle / "bundle.json").read_text())
    del manifest["components"]["unet_step"]
    (tiny_bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="2"):
        main([str(tiny_bundle)])
    assert "has no unet_step in the form opset20-fp32" in capsys.readouterr().err
