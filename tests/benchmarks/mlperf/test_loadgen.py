"""MLPerf's real load generator through ``driver`` and ``process``, its ``logs``, and the pipeline as ``answerer``.

Loadgen itself is the oracle: its verdict, and the numbers in its logs.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest

from latentrt.benchmarks.mlperf.loadgen import LoadgenRun, main, run_loadgen
from latentrt.benchmarks.mlperf.logs import parse_detail
from latentrt.benchmarks.mlperf.terms import SCENARIOS, fewest_queries
from latentrt.engines import Array, FakeEngine, TensorSpec
from latentrt.engines.errors import EngineError, EngineUnavailableError, InvalidRequestError, OutputError
from latentrt.runtime import Bundle, Pipeline, Run

pytest.importorskip("mlperf_loadgen", reason="loadgen has packages for Linux only")
# What goes wrong here goes wrong as a test that never ends. Exporting the bundles takes longer, and is not counted.
pytestmark = pytest.mark.timeout(60, func_only=True)

Denoiser = Callable[[Mapping[str, Array]], None]


def zeros(name: str, shape: tuple[int, ...]) -> dict[str, Array]:
    return {name: np.zeros(shape, np.float32)}


@pytest.fixture
def fast(tiny_bundles: dict[str, Path]) -> Callable[..., Pipeline]:
    """Makes pipelines of plain functions that take a fraction of a millisecond a step."""

    def make(watch: Denoiser = lambda feeds: None, prompt_cache: int = 0) -> Pipeline:
        def denoise(feeds: Mapping[str, Array]) -> dict[str, Array]:
            watch(feeds)
            return zeros("out_sample", feeds["sample"].shape)

        states, latents = ("batch", "sequence", 32), ("batch", 4, "height", "width")
        engines = {
            "text_encoder": FakeEngine(
                [TensorSpec("input_ids", "int64", ("batch", "sequence"))],
                [TensorSpec("last_hidden_state", "float32", states)],
                lambda feeds: zeros("last_hidden_state", (*feeds["input_ids"].shape, 32)),
            ),
            "unet": FakeEngine(
                [
                    TensorSpec("sample", "float32", latents),
                    TensorSpec("timestep", "float32", ("batch",)),
                    TensorSpec("encoder_hidden_states", "float32", states),
                ],
                [TensorSpec("out_sample", "float32", latents)],
                denoise,
            ),
            "vae_decoder": FakeEngine(
                [TensorSpec("latent_sample", "float32", latents)],
                [TensorSpec("sample", "float32", ("batch", 3, "h", "w"))],
                lambda feeds: zeros("sample", (len(feeds["latent_sample"]), 3, 32, 32)),
            ),
        }
        bundle = Bundle.open(tiny_bundles["sd1"])
        return Pipeline(bundle, {name: each.open() for name, each in engines.items()}, prompt_cache=prompt_cache)

    return make


def run(pipeline: Pipeline, scenario: str, directory: Path, **changed: Any) -> LoadgenRun:
    options: dict[str, Any] = {
        "prompts": ["a red apple", "a rocket", "a cat"],
        "steps": 2,
        "guidance": 1.0,
        "sampler": "euler",
        "width": 32,
        "height": 32,
        "seed": 0,
        "min_duration_seconds": 0.5,
        "min_queries": 64,
    }
    if scenario == "Server":
        options |= {"target_qps": 150.0, "target_latency_seconds": 0.5, "percentile": 0.9, "batch": 4}
    return run_loadgen(pipeline, scenario, directory=directory, **{**options, **changed})


# --- valid runs


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_loadgen_calls_a_run_valid_and_its_numbers_are_passed_on(
    fast: Callable[..., Pipeline], tmp_path: Path, scenario: str
) -> None:
    """Verdict and figures are those of the summary that loadgen wrote, in seconds where that has nanoseconds."""
    calls: list[int] = []
    report = run(fast(lambda feeds: calls.append(len(feeds["sample"]))), scenario, tmp_path)
    summary = (tmp_path / "mlperf_log_summary.txt").read_text()
    assert report["scenario"] == scenario
    assert report["summary"] == summary
    assert report["valid"]
    assert "Result is : VALID" in summary
    assert "No errors encountered" in summary
    shown = dict(re.findall(r"^ *(.+?) *: +([0-9.]+)$", summary, re.MULTILINE))
    shown["Samples per second"] = shown.get("Samples per second", shown.get("Completed samples per second", "0"))
    result = report["result"]
    for name in ("Min", "Mean", "Max"):
        assert result[f"latency_{name.lower()}_seconds"] == pytest.approx(int(shown[f"{name} latency (ns)"]) / 1e9)
    for rank in ("50", "90", "95", "97", "99", "99.9"):
        nanoseconds = int(shown[f"{float(rank):.2f} percentile latency (ns)"])
        assert result[f"latency_p{rank}_seconds"] == pytest.approx(nanoseconds / 1e9)
    headline, line = {
        "SingleStream": ("queries_per_second", "QPS w/ loadgen overhead"),
        "Offline": ("samples_per_second", "Samples per second"),
        "Server": ("completed_samples_per_second", "Samples per second"),
    }[scenario]
    assert result[headline] == pytest.approx(float(shown[line]), abs=0.01, rel=1e-4)
    # Two steps a picture, those of the warm-up too: nothing was answered without having been drawn.
    warm_up = len(report["settings"]["warm_up_seconds"]) * report["settings"]["batch"]
    assert sum(calls) == 2 * (result["samples"] + warm_up)
    assert result["samples"] >= 64
    seeds = {name: int(shown[name]) for name in ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed")}
    # https://github.com/mlcommons/inference/blob/master/loadgen/mlperf.conf
    assert list(seeds.values()) == [2085463073848966840, 2747215439041700203, 16159082839903944936]
    assert "The run was to last 0.5 s; MLPerf asks for 600 s." in report["notes"]


def test_single_stream_reports_the_early_stopping_estimate(fast: Callable[..., Pipeline], tmp_path: Path) -> None:
    """It is the figure that MLPerf takes, on the safe side of the percentile."""
    report = run(fast(), "SingleStream", tmp_path)
    match = re.search(r"90\.0th percentile estimate: (\d+)", report["summary"])
    assert match is not None
    assert report["result"]["early_stopping_p90_seconds"] == pytest.approx(int(match[1]) / 1e9)
    assert report["result"]["early_stopping_p90_seconds"] >= report["result"]["latency_p90_seconds"]


@pytest.mark.parametrize(
    ("scenario", "model", "queries", "batch"), [("Offline", "emoji", 4, 2), ("SingleStream", "sd1", 64, 1)]
)
def test_real_engines(
    emoji_bundle: Path,
    tiny_bundles: dict[str, Path],
    tmp_path: Path,
    scenario: str,
    model: str,
    queries: int,
    batch: int,
) -> None:
    """The rate is the number of pictures by the time that they took, and the engine's version is stated."""
    bundle = {"emoji": emoji_bundle, **tiny_bundles}[model]
    with Pipeline.load(bundle, "onnxruntime", precision="fp32", threads=1, prompt_cache=0) as pipeline:
        sizes: dict[str, Any] = {"steps": 1, "width": None, "height": None, "batch": batch}
        report = run(pipeline, scenario, tmp_path, min_queries=queries, min_duration_seconds=0.01, **sizes)
    assert report["valid"]
    result, offline = report["result"], scenario == "Offline"
    rate = result["samples_per_second" if offline else "queries_per_second"]
    seconds = result["latency_max_seconds"] if offline else result["samples"] * result["latency_mean_seconds"]
    assert rate * seconds == pytest.approx(result["samples"], rel=0.1)
    assert report["settings"]["engine"] == "onnxruntime"
    assert report["settings"]["width"] == {"emoji": 64, "sd1": 32}[model]
    assert report["versions"]["onnxruntime"] == onnxruntime.__version__


# --- batches


def test_server_batches_what_is_waiting_between_steps(fast: Callable[..., Pipeline], tmp_path: Path) -> None:
    """Queries come faster than one alone is drawn; they join those that are under way, up to the batch."""
    steps: list[set[float]] = []
    rows: list[int] = []

    def watch(feeds: Mapping[str, Array]) -> None:
        time.sleep(0.01)
        rows.append(len(feeds["sample"]))
        steps.append(set(feeds["timestep"].tolist()))

    report = run(fast(watch), "Server", tmp_path, steps=4, target_qps=60.0, batch=4, min_queries=50)
    assert report["valid"]
    assert max(rows[8:]) == 4  # after the warm-ups
    assert any(len(each) > 1 for each in steps[8:])


def test_offline_keeps_the_batch_full(
    fast: Callable[..., Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls but the last have as many rows as the batch, and prompts come in the order of loadgen's log."""
    rows: list[int] = []
    drawn: list[str] = []
    pipeline = fast(lambda feeds: rows.append(len(feeds["sample"])))
    start = pipeline.start

    def note(prompt: str, **options: Any) -> Run:
        drawn.append(prompt)
        return start(prompt, **options)

    monkeypatch.setattr(pipeline, "start", note)
    options: dict[str, Any] = {"target_qps": 1.0, "min_queries": 20, "min_duration_seconds": 1e-3}
    prompts = ["a", "b", "c", "d"]
    report = run(pipeline, "Offline", tmp_path, prompts=prompts, batch=3, **options)
    assert report["result"]["samples"] == 20
    assert rows[4:] == [3] * 12 + [2] * 2
    match = re.search(r'"loaded_qsl_set", "value": (\[.*?\])', (tmp_path / "mlperf_log_detail.txt").read_text())
    assert match is not None
    assert drawn[6:] == [prompts[index] for index in json.loads(match[1]) * 5]


# --- runs that are not valid


@pytest.mark.parametrize("scenario", ["SingleStream", "Server"])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_valid_run_needs_so_many_queries(
    fast: Callable[..., Pipeline], tmp_path: Path, scenario: str, missing: int
) -> None:
    """With one fewer, loadgen cannot be sure enough of the percentile, here the 90th for both."""
    queries = fewest_queries(scenario, 0.9) - missing
    report = run(fast(), scenario, tmp_path, min_queries=queries, min_duration_seconds=1e-3)
    assert report["result"]["queries"] == queries
    assert report["valid"] == (not missing)
    assert f"Early stopping satisfied: {'NO' if missing else 'Yes'}" in report["summary"]
    assert ("early_stopping_p90_seconds" in report["result"]) == (scenario == "SingleStream" and not missing)


def test_late_answers_make_a_server_run_invalid(fast: Callable[..., Pipeline], tmp_path: Path) -> None:
    """A target that cannot be met is not met."""
    report = run(fast(), "Server", tmp_path, target_latency_seconds=1e-6)
    assert not report["valid"]
    assert report["result"]["late_queries"] == report["result"]["samples"]
    assert "Performance constraints satisfied : NO" in report["summary"]


def test_texts_that_are_kept_are_noted(fast: Callable[..., Pipeline], tmp_path: Path) -> None:
    """MLPerf forbids it."""
    for size in (0, 1 << 20):
        report = run(fast(prompt_cache=size), "SingleStream", tmp_path, min_duration_seconds=0.01)
        assert any("MLPerf's rules forbid" in note for note in report["notes"]) == bool(size)


# --- failures


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_failure_ends_the_run_with_its_own_exception(
    fast: Callable[..., Pipeline], tmp_path: Path, scenario: str
) -> None:
    """Loadgen waits for every answer, and would wait forever; its process is gone when the exception arrives."""
    before = set(children())
    calls: list[int] = []

    def fail(feeds: Mapping[str, Array]) -> None:
        calls.extend([1] * (set(children()) > before))
        if len(calls) == 20:
            raise EngineError("the GPU fell off the bus")

    begin = time.perf_counter()
    with pytest.raises(EngineError, match="the GPU fell off the bus"):
        run(fast(fail), scenario, tmp_path, min_duration_seconds=300.0, target_qps=100.0)
    assert time.perf_counter() - begin < 10
    assert set(children()) == before


def test_a_loadgen_that_dies_is_reported(fast: Callable[..., Pipeline], tmp_path: Path) -> None:
    """The message says how it ended."""
    before = set(children())

    def kill(feeds: Mapping[str, Array]) -> None:
        for child in set(children()) - before:
            child.kill()

    with pytest.raises(EngineError, match="loadgen ended with status -9 before its test was over"):
        run(fast(kill), "SingleStream", tmp_path, min_duration_seconds=300.0, target_qps=100.0)
    assert set(children()) == before


def test_ctrl_c_ends_a_run_at_once(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    """Even while loadgen sleeps until the next query is due, minutes later; its process goes, too."""
    command = [
        sys.executable,
        "-m",
        "latentrt.benchmarks.mlperf.loadgen",
        str(tiny_bundles["sd1"]),
        "--scenario",
        "Server",
    ]
    command += ["--steps", "1", "--qps", "0.01", "--latency", "1", "--logs", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while process.poll() is None and not (tmp_path / "mlperf_log_detail.txt").exists():
            time.sleep(0.02)
        time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of them
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (130, "loadgen: interrupted\n")
    assert not any(child.is_running() for child in family)


def test_a_missing_loadgen_is_one_sentence(
    fast: Callable[..., Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the extra."""
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(EngineUnavailableError, match=r'install it with: pip install "latentrt\[bench\]"$'):
        run(fast(), "Offline", tmp_path)


@pytest.mark.parametrize(
    ("scenario", "changed", "message"),
    [
        ("MultiStream", {}, "scenario is 'MultiStream', expected one of SingleStream, Offline, Server"),
        ("Offline", {"prompts": []}, "there are no prompts"),
        ("Offline", {"min_duration_seconds": math.nan}, "min_duration_seconds is nan, expected a number above 0"),
        ("Offline", {"target_qps": 0.0}, "target_qps is 0.0, expected a number above 0"),
        ("Offline", {"min_queries": 0}, "min_queries is 0, expected 1 or more"),
        ("Offline", {"batch": True}, "batch is True"),
        ("Offline", {"target_latency_seconds": 1.0}, "Offline has no target latency"),
        ("SingleStream", {"batch": 2}, "SingleStream has one query at a time"),
        ("Server", {"target_qps": None}, "Server needs a target_qps and a target_latency_seconds"),
        ("Server", {"percentile": 99}, "percentile is 99, expected a share between 0 and 1"),
        ("Offline", {"steps": 0}, "steps"),
    ],
)
def test_what_cannot_be_run_is_refused(
    fast: Callable[..., Pipeline], tmp_path: Path, scenario: str, changed: dict[str, Any], message: str
) -> None:
    """Before anything is drawn, in one sentence."""
    calls: list[int] = []
    with pytest.raises(InvalidRequestError, match=message):
        run(fast(lambda feeds: calls.append(1)), scenario, tmp_path, **changed)
    assert not calls


def test_logs_that_cannot_be_written(fast: Callable[..., Pipeline], tmp_path: Path) -> None:
    """A file where the directory should be, and a log that breaks off or is empty."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="loadgen's logs cannot be written to"):
        run(fast(), "Offline", tmp_path / "file")
    run(fast(), "Offline", tmp_path, min_queries=4, min_duration_seconds=0.01)
    text = (tmp_path / "mlperf_log_detail.txt").read_text()
    assert parse_detail(text)["samples"] >= 4
    for broken in (text[:-40], text[:3000], ""):
        with pytest.raises(OutputError, match="see whether the disk is full"):
            parse_detail(broken)


# --- the command


def test_the_command_writes_a_report(
    tiny_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints loadgen's summary and says with its status whether the run was valid; wrong options are one line."""
    output = tmp_path / "report.json"
    command = [str(tiny_bundles["sd1"]), "--scenario", "Offline", "--engine", "onnxruntime", "--threads", "1"]
    command += ["--steps", "1", "--duration", "0.2", "--batch", "2", "--json", str(output)]
    assert main(command) == 0
    report = json.loads(output.read_text())
    assert report["valid"]
    assert report["settings"]["batch"] == 2
    shown = capsys.readouterr().out
    assert shown.startswith(report["summary"].strip())
    assert "No official MLPerf result" in shown
    for wrong, message in (
        (["--qps", "-1"], "target_qps is -1.0, expected a number above 0"),
        (["--scenario", "Server", "--percentile", "99"], "percentile is 99.0, expected a share between 0 and 1"),
    ):
        assert main([*command, *wrong]) == 1
        assert capsys.readouterr().err.startswith(f"loadgen: {message}")
