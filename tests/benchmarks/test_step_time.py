"""The benchmark of a step, on models of which a step takes milliseconds, and checkpoints to run it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentrt.benchmarks.checkpoints.stable_diffusion import main as write
from latentrt.benchmarks.studies.step_time import main
from latentrt.exporter.source.opening import open_source


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
    assert "take numbers from 1" in capsys.readouterr().err


def test_a_bundle_without_stages_is_refused(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names what is missing."""
    manifest = json.loads((tiny_bundle / "bundle.json").read_text())
    del manifest["components"]["unet_step"]
    (tiny_bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="2"):
        main([str(tiny_bundle)])
    assert "has no unet_step in the form opset20-fp32" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_checkpoint_of_random_weights(emoji_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a source that the exporter takes, the same for the same seed; a directory in use is left alone."""
    flags = ["--size", "tiny", "--tokenizer", str(emoji_source / "tokenizer")]
    fingerprints = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert write([str(tmp_path / name), *flags, "--seed", seed]) == 0
        fingerprints.append(open_source(tmp_path / name).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    with pytest.raises(SystemExit, match="2"):
        write([str(tmp_path / "a"), *flags])
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        write([str(tmp_path / "d"), "--tokenizer", str(tmp_path / "nowhere")])
    assert "is not there; name the directory of a CLIP tokenizer" in capsys.readouterr().err
