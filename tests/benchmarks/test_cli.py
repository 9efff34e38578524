"""``latentrt bench`` from the command line through ``worker`` and ``assemble`` to the report."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks import cli
from latentrt.benchmarks.assembly import assemble
from latentrt.benchmarks.assembly.assemble import Assembly
from latentrt.benchmarks.contest.contenders import OURS, Contender
from latentrt.benchmarks.report.document import read
from latentrt.benchmarks.roofline.ceilings import measure_ceilings
from latentrt.engines.errors import OutputError
from latentrt.runtime.cli import main


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, fake_command: list[str], steady_control: None) -> dict[str, Contender]:
    """Contenders that draw nothing, by the names of real ones; tests change their options."""
    table = {
        name: Contender(name, name.upper(), OURS, options={"engine": "onnxruntime", "precision": "fp32", **options})
        for name, options in {
            "latentrt-onnxruntime-fp32": {"seconds": 0.002},
            "latentrt-openvino-fp32": {"seconds": 0.001, "shade": 90},
        }.items()
    }
    monkeypatch.setattr(cli, "chosen", lambda names: [table[name] for name in names])
    return table


def bench(bundle: Path, output: Path, *more: str, names: tuple[str, ...] = ()) -> list[str]:
    contenders = names or ("latentrt-onnxruntime-fp32", "latentrt-openvino-fp32")
    return [
        "bench",
        str(bundle),
        "--output",
        str(output),
        "--steps",
        "3",
        "--no-ceilings",
        *more,
        "--contenders",
        *contenders,
    ]


def test_a_run_is_reported(tiny_bundles: dict[str, Path], tmp_path: Path, fakes: dict[str, Contender]) -> None:
    """Samples, medians, ratios, quality and batches of every contender are in a document that the schema takes."""
    arguments = bench(tiny_bundles["sd1"], tmp_path, "--rounds", "4", "--batches", "2", "--extrapolate", "30")
    assert main(arguments) == 0
    report = read(tmp_path / "report.json")
    assert report["complete"]
    slow, fast = report["contenders"]
    assert slow["summary"]["total"]["median"] == pytest.approx(0.008)
    assert fast["samples"]["step"] == [[0.001] * 3] * 4
    assert fast["ratios"]["step"] == {"median": 2.0, "low": 2.0, "high": 2.0, "pairs": 4}
    assert fast["quality"] is not None
    assert fast["quality"]["psnr"] == pytest.approx(10 * np.log10(255**2 / 10**2))
    assert slow["quality"] == {"psnr": 100.0, "ssim": 1.0, "reference": "latentrt-onnxruntime-fp32"}
    assert fast["extrapolated"] is not None
    assert fast["extrapolated"]["seconds"]["median"] == pytest.approx(0.032)
    assert [each["images"] for each in fast["throughput"]] == [1, 2]
    assert fast["throughput"][1]["per_minute"]["median"] == pytest.approx(60 * 2 / 0.008)
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert "LATENTRT-OPENVINO-FP32" in (tmp_path / "report.md").read_text()


def test_what_became_slower_is_found(
    tiny_bundles: dict[str, Path], tmp_path: Path, fakes: dict[str, Contender], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs of the same agree and exit 0; an engine that was slowed exits 1 and is named."""
    runs = {name: tmp_path / name for name in ("old", "same", "slowed")}
    for name, folder in runs.items():
        if name == "slowed":
            slowed = fakes["latentrt-onnxruntime-fp32"]
            fakes[slowed.name] = Contender(
                slowed.name, slowed.label, OURS, options={**slowed.options, "seconds": 0.003}
            )
        assert main(bench(tiny_bundles["sd1"], folder, "--rounds", "6", names=("latentrt-onnxruntime-fp32",))) == 0
    capsys.readouterr()

    def compared(new: str) -> tuple[int, str]:
        status = main(["bench", "--compare", str(runs["old"] / "report.json"), str(runs[new] / "report.json")])
        return status, capsys.readouterr().out

    assert compared("same")[0] == 0
    status, text = compared("slowed")
    assert status == 1
    assert "ONNXRUNTIME" in text.upper()


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "full disk"])
def test_a_run_that_ends_early_leaves_a_valid_report(
    how: str,
    tiny_bundles: dict[str, Path],
    tmp_path: Path,
    fakes: dict[str, Contender],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was measured is there, with a sentence of what is missing; the exit status says that the run did not end."""
    saved = 0
    save = Assembly.save

    def counting(self: Assembly, *arguments: Any, **named: Any) -> Any:
        nonlocal saved
        if how == "full disk" and saved == 6:
            raise OutputError("cannot write report.json: No space left on device; free some space")
        report = save(self, *arguments, **named)
        saved += 1
        return report

    def interrupt() -> None:
        while saved < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[how])

    monkeypatch.setattr(Assembly, "save", counting)
    if how != "full disk":
        threading.Thread(target=interrupt).start()
    try:
        status = main(bench(tiny_bundles["sd1"], tmp_path, "--rounds", "500"))
    except SystemExit as ended:
        status = ended.code
    assert status == {"SIGINT": 130, "SIGTERM": 143, "full disk": 1}[how]
    report = read(tmp_path / "report.json")
    assert not report["complete"]
    assert "rounds took place" in report["missing"][-1]
    assert 1 <= len(report["contenders"][0]["samples"]["total"]) < 500
    assert report["contenders"][0]["state"] == "partial"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "name the bundle to measure"),
        (["bench", "{bundle}", "--rounds", "0"], "--rounds is 0, expected 1 or more"),
        (["bench", "{bundle}", "--budget", "nan"], "--budget is nan, expected a number of seconds above 0"),
        (["bench", "{bundle}", "--batches", "2;4"], "is no list of numbers"),
        (["bench", "{bundle}", "--width", "33"], "width is 33, expected a multiple of"),
        (["bench", "{bundle}", "--contenders", "pytorch"], "unknown contender 'pytorch'"),
        (["bench", "{bundle}", "--build"], "--build needs --contenders"),
        (["bench", "{bundle}", "--threads", "-1"], "--threads is -1"),
        (["bench", "{xl}"], "holds a model of stable-diffusion-xl"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str],
    message: str,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one sentence, with exit status 2, before anything is measured."""
    monkeypatch.chdir(tmp_path)
    bundles = {"bundle": tiny.bundle("sd1"), "xl": tiny.bundle("sdxl")}
    capsys.readouterr()
    assert main([argument.format_map(bundles) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.heavy
def test_latentrt_itself_is_measured(
    tiny_bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The real worker draws the same image in fp32 on both engines, and its stages are placed under the roofline."""
    arguments = bench(tiny_bundles["sd1"], tmp_path, "--rounds", "2", "--json", "--warm-up", "0")
    arguments.remove("--no-ceilings")
    monkeypatch.setattr(
        assemble,
        "measure_ceilings",
        lambda threads: measure_ceilings(threads, seconds=0.1, sizes=(64,), copied=1 << 20),
    )
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == read(tmp_path / "report.json")
    for contender in report["contenders"]:
        assert contender["state"] == "measured", contender["reason"]
        assert contender["quality"]["psnr"] > 60
        stages = {row["stage"]: row for row in contender["roofline"]}
        assert stages.keys() == {"text_encoder", "prompt", "schedule", "step", "vae_decoder"}
        assert all(row["flops"] > 0 and row["achieved_flops"] > 0 for row in stages.values())
        assert contender["disk_bytes"] > 0
        summary = contender["summary"]
        assert summary["total"]["median"] > 3 * summary["step"]["p50"] > 0
