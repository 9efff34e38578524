"""The benchmark of a U-Net's build, at a size that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from latentrt.benchmarks.checkpoints.stable_diffusion import CONFIGS
from latentrt.benchmarks.studies.build_sd15_unet import main


@pytest.mark.heavy
def test_tiny_unet_is_built_and_measured(tmp_path: Path) -> None:
    """The benchmark exports and builds, and reports time, peak memory and sizes of both steps."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an optional extra")
    command = [sys.executable, "-m", "latentrt.benchmarks.studies.build_sd15_unet", "--size", "tiny"]
    command += ["--json", str(tmp_path / "report.json"), "--directory", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    export, build = report["steps"]
    assert (export["name"], build["name"]) == ("export", "build")
    assert build["output_bytes"] == (tmp_path / "kept" / "unet.plan").stat().st_size
    assert export["output_bytes"] == (tmp_path / "kept" / report["graph"]).stat().st_size
    assert export["output_bytes"] > 2 * report["parameters"]
    for step in (export, build):
        assert step["seconds"] > 0
        assert step["peak_bytes"] > step["output_bytes"]
    assert 0 < report["largest_activation"] < 65504
    assert report["within_limits"] is True
    assert "| build  |" in done.stdout


def test_directory_must_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory that holds something is refused, and left as it is."""
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(["--directory", str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_full_size_is_that_of_stable_diffusion() -> None:
    """The full configuration has the 859,520,964 parameters of the U-Net of Stable Diffusion 1.5."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**CONFIGS["sd15"])
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
