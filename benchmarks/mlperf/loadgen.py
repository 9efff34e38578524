"""MLPerf's scenarios SingleStream, Offline and Server: queries and verdict from its load generator, pictures from us.

    python -m latentrt.benchmarks.mlperf.loadgen BUNDLE --scenario SingleStream [--steps N] [--duration S] [--json FILE]

Loadgen (https://github.com/mlcommons/inference/tree/master/loadgen) decides when a query comes, takes the time from
then until its picture is in host memory, and says whether the run is valid. It has a process of its own,
:mod:`latentrt.benchmarks.mlperf.process`; the pipeline runs in the calling thread. So an exception of the pipeline, or
Ctrl-C, ends the run at once.

- SingleStream: the next query comes when the last one was answered. The result is a percentile of the latency.
- Offline: all queries come at once. The result is pictures per second.
- Server: queries come at random, as a Poisson process. The run is valid if enough of them were answered in time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

from latentrt.engines.errors import EngineError, EngineUnavailableError, InvalidRequestError, LatentRTError, OutputError
from latentrt.engines.kinds import KINDS
from latentrt.exporter.precision.calibration import PROMPTS, read_prompts
from latentrt.runtime.components.engine_probe import probe
from latentrt.runtime.denoising.run import Run
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request.options import RequestOptions

SCENARIOS = ("SingleStream", "Offline", "Server")
"""Scenarios of MLPerf inference that are run here."""

OFFICIAL_SECONDS = 600.0
"""Shortest run that MLPerf takes as a submission (``min_duration`` in loadgen's ``mlperf.conf``)."""

FEWEST_QUERIES = {"SingleStream": 64, "Offline": 24, "Server": 459}
"""Queries that a short run should have at least.

For SingleStream and Server, loadgen calls a run with fewer invalid (``early_stopping.cc``). It wants to be 99 % sure of
the percentile: for the 90th of SingleStream that takes 64 queries, for the 99th of Server 459, if none of them is late.
Offline has no such limit; this many make an average.
"""

_SLACK = 1.25  # expected rate over measured rate, so that a run does not end before its shortest duration
_SUMMARY, _DETAIL = "mlperf_log_summary.txt", "mlperf_log_detail.txt"
_PATIENCE = 10.0  # seconds that loadgen's process may take to end after its test

# Keys of loadgen's detailed log, and ours; the summary has the same numbers, rates in it to two decimals only.
_COUNTS = {"result_query_count": "queries", "result_overlatency_query_count": "late_queries", "num_errors": "errors"}
_RATES = {
    "result_samples_per_second": "samples_per_second",
    "result_scheduled_samples_per_sec": "scheduled_samples_per_second",
    "result_completed_samples_per_sec": "completed_samples_per_second",
    "result_qps_with_loadgen_overhead": "queries_per_second",
    "result_qps_without_loadgen_overhead": "queries_per_second_without_loadgen",
}
_NANOSECONDS = {
    "result_min_latency_ns": "latency_min_seconds",
    "result_mean_latency_ns": "latency_mean_seconds",
    "result_max_latency_ns": "latency_max_seconds",
    "early_stopping_latency_ss": "early_stopping_p90_seconds",  # what MLPerf reports for SingleStream
    "early_stopping_latency_ms": "early_stopping_p99_seconds",
}
_PERCENTILE = re.compile(r"result_([0-9.]+)_percentile_latency_ns")


class LoadgenRun(TypedDict):
    """One run.

    Keys:
        scenario: One of :data:`SCENARIOS`.
        valid: What loadgen says of it.
        result: Loadgen's numbers: counts, rates per second, latencies in seconds.
        summary: The text of its ``mlperf_log_summary.txt``.
        versions: Of loadgen, Python, LatentRT and the engine's SDK.
        settings: What was asked for, and what was found out before: the request, duration, batch, expected rate.
        notes: What to know about the figures, a sentence each.
    """

    scenario: str
    valid: bool
    result: dict[str, float]
    summary: str
    versions: dict[str, str]
    settings: dict[str, Any]
    notes: list[str]


def fewest_queries(scenario: str, percentile: float | None = None) -> int:
    """:data:`FEWEST_QUERIES`, and for Server at any percentile.

    Args:
        scenario: One of :data:`SCENARIOS`.
        percentile: Server: share of queries that must not be late; ``None`` is MLPerf's 0.99.

    Raises:
        InvalidRequestError: if the percentile is no share.
    """
    if scenario != "Server" or percentile is None:
        return FEWEST_QUERIES[scenario]
    _check_percentile(percentile)
    return math.ceil(math.log(0.01) / math.log(percentile))


def run_loadgen(
    pipeline: Pipeline,
    scenario: str,
    *,
    prompts: Sequence[str],
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
    width: int | None,
    height: int | None,
    seed: int,
    min_duration_seconds: float,
    min_queries: int,
    directory: Path,
    target_qps: float | None = None,
    target_latency_seconds: float | None = None,
    batch: int = 1,
    percentile: float | None = None,
) -> LoadgenRun:
    """Run one scenario, in loadgen's mode PerformanceOnly and with the seeds of its ``mlperf.conf``.

    Args:
        pipeline: Draws the pictures. MLPerf forbids keeping results from one query for the next: load it with
            ``prompt_cache=0``.
        scenario: One of :data:`SCENARIOS`.
        prompts: What loadgen chooses from; a query is one prompt and one picture.
        steps: ``None`` for the bundle's default, as for the four that follow.
        guidance: Guidance scale.
        sampler: Name of the sampler.
        width: In pixels.
        height: In pixels.
        seed: Of every picture's noise.
        min_duration_seconds: How long the run is to take at least.
        min_queries: How many queries there are to be at least; :func:`fewest_queries` says what it takes to be valid.
        directory: Where loadgen writes its logs, over those that are there.
        target_qps: Server: queries a second. Else pictures a second to expect, from which loadgen reckons how many
            queries fill the duration; ``None`` for 1.25 times the fastest of the warm-up.
        target_latency_seconds: Server: when a query is late.
        batch: Offline and Server: most pictures that are drawn together. They join and leave between steps.
        percentile: Server: share of queries that must not be late; ``None`` is MLPerf's 0.99.

    Raises:
        InvalidRequestError: for what cannot be run as asked.
        EngineUnavailableError: if loadgen is not installed.
        EngineError: if an engine fails, or loadgen does.
        OutputError: if loadgen could not write its logs.
    """
    _check(scenario, prompts, min_duration_seconds, min_queries, target_qps, target_latency_seconds, batch, percentile)
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise EngineUnavailableError(
            "mlperf_loadgen is not installed, which MLPerf's scenarios need; "
            'install it with: pip install "latentrt[bench]"'
        )
    options: RequestOptions = {"steps": steps, "guidance": guidance, "sampler": sampler, "seed": seed, "images": 1}
    options |= {"width": width, "height": height}
    drawer = _Drawer(pipeline, prompts, options, batch)
    run = drawer.warm_up(0.0 if target_qps else min(2.0, 0.1 * min_duration_seconds))
    expected = target_qps or _SLACK * batch / min(drawer.warm_ups)
    settings: dict[str, Any] = {
        "min_duration_ms": max(1, round(1e3 * min_duration_seconds)),
        "min_query_count": min_queries,
    }
    if scenario == "SingleStream":
        settings["single_stream_expected_latency_ns"] = 1e9 / expected
    elif scenario == "Offline":
        settings["offline_expected_qps"] = expected
    else:
        assert target_latency_seconds is not None, "checked above"
        settings |= {"server_target_qps": expected, "server_target_latency_ns": round(1e9 * target_latency_seconds)}
        if percentile is not None:
            settings["server_target_latency_percentile"] = percentile
    _clear(directory)
    job = {"scenario": scenario, "samples": len(prompts), "directory": str(directory), "settings": settings}
    with _Loadgen() as loadgen:
        loadgen.begin(job)
        drawer.answer(loadgen)
    summary = _read(directory / _SUMMARY)
    request = run.request
    return {
        "scenario": scenario,
        "valid": _verdict(summary, directory),
        "result": parse_detail(_read(directory / _DETAIL)),
        "summary": summary,
        "versions": _versions(pipeline),
        "settings": {
            "engine": pipeline.engine_choice.name,
            "prompts": len(prompts),
            **{name: getattr(request, name) for name in ("steps", "guidance", "sampler", "width", "height", "seed")},
            "batch": batch,
            "warm_up_seconds": drawer.warm_ups,
            "expected_samples_per_second": expected,
            "loadgen": settings,
        },
        "notes": _notes(pipeline, min_duration_seconds, percentile),
    }


def parse_detail(text: str) -> dict[str, float]:
    """Loadgen's figures from the text of its ``mlperf_log_detail.txt``: counts, rates per second, times in seconds.

    Raises:
        OutputError: if the text breaks off, or has no figures.
    """
    lines = [line.removeprefix(":::MLLOG ") for line in text.splitlines() if line.startswith(":::MLLOG ")]
    try:
        entries = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise OutputError("loadgen's detailed log breaks off; see whether the disk is full") from error
    values = {entry["key"]: entry["value"] for entry in entries}
    if "result_mean_latency_ns" not in values or "generated_samples_per_query" not in values:
        raise OutputError("loadgen's detailed log has no results; see whether the disk is full")
    found: dict[str, float] = {ours: values[key] for key, ours in (_COUNTS | _RATES).items() if key in values}
    found["samples"] = values["result_query_count"] * values["generated_samples_per_query"]
    # Zero stands for an estimate that there were too few queries for.
    found |= {ours: values[key] / 1e9 for key, ours in _NANOSECONDS.items() if values.get(key)}
    for key, value in values.items():
        if match := _PERCENTILE.fullmatch(key):
            found[f"latency_p{float(match[1]):g}_seconds"] = value / 1e9
    return found


class _Drawer:
    """Answers queries with pictures, as many together as the batch has room for.

    Attributes:
        warm_ups: Seconds that each batch of the warm-up took.
    """

    def __init__(self, pipeline: Pipeline, prompts: Sequence[str], options: RequestOptions, batch: int) -> None:
        self._pipeline, self._prompts, self._options, self._batch = pipeline, prompts, options, batch
        self.warm_ups: list[float] = []

    def warm_up(self, seconds: float) -> Run:
        """Draw a full batch twice, and again until the time is up; returns one of the runs."""
        begin = time.perf_counter()
        while len(self.warm_ups) < 2 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            runs = [self._start(number % len(self._prompts)) for number in range(self._batch)]
            while not runs[0].done:
                self._pipeline.advance(runs)
            for run in runs:
                self._pipeline.finish(run)
            self.warm_ups.append(time.perf_counter() - start)
        return runs[0]

    def answer(self, loadgen: _Loadgen) -> None:
        """Answer queries until the test is over."""
        waiting: deque[tuple[int, int]] = deque()
        running: list[tuple[int, Run]] = []
        while (due := loadgen.due(wait=not waiting and not running)) is not None:
            waiting.extend(due)
            while waiting and len(running) < self._batch:
                number, index = waiting.popleft()
                running.append((number, self._start(index)))
            if not running:
                continue
            self._pipeline.advance([run for _, run in running])
            for number, run in running:
                if run.done:
                    self._pipeline.finish(run)
                    loadgen.complete(number)
            running = [(number, run) for number, run in running if not run.done]

    def _start(self, index: int) -> Run:
        return self._pipeline.start(self._prompts[index], **self._options)


class _Loadgen:
    """Loadgen's process. Leaving the context ends it, whatever it does."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        # -P: the folder of the file holds modules with names of the standard library's.
        command = [sys.executable, "-P", str(Path(__file__).with_name("process.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8"
        )
        # Read at once, always: loadgen is late with the next query while it cannot get rid of one.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if error is not None:
                self._process.kill()
            with contextlib.suppress(BrokenPipeError):  # it is gone, and something was left to write
                self._process.stdin.close()
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # the logs are complete; only the process is not
            pass
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()
            self._errors.close()

    def begin(self, job: Mapping[str, Any]) -> None:
        """Begin a test, as :func:`latentrt.benchmarks.mlperf.process.main` takes it; one a process."""
        self._say(job)

    def due(self, *, wait: bool) -> list[tuple[int, int]] | None:
        """Queries that came since the last call, as number and index of the prompt; ``None`` when the test is over.

        Args:
            wait: Wait for one.

        Raises:
            EngineError: if the process ended before its test.
        """
        found: list[tuple[int, int]] = []
        while wait or not self._messages.empty():
            message = self._messages.get()
            if message is None:
                raise self._failure()
            if "over" in message:
                return None
            found += [(number, index) for number, index in message["queries"]]
            wait = False
        return found

    def complete(self, number: int) -> None:
        """Say that a query was answered."""
        self._say({"done": [number]})

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # the last line of a process that was killed may be half a one
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _failure(self) -> EngineError:
        try:
            status = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it does not talk any more
            self._process.kill()
            status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return EngineError(f"loadgen ended with status {status} before its test was over: {said[:300]}")


def _check(
    scenario: str,
    prompts: Sequence[str],
    duration: float,
    queries: int,
    rate: float | None,
    latency: float | None,
    batch: int,
    percentile: float | None,
) -> None:
    if scenario not in SCENARIOS:
        raise InvalidRequestError(f"unknown scenario {scenario!r}; known scenarios: {', '.join(SCENARIOS)}")
    if not prompts:
        raise InvalidRequestError("there are no prompts to draw; give at least one")
    positive = {"min_duration_seconds": duration, "target_qps": rate, "target_latency_seconds": latency}
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InvalidRequestError(f"{name} is {value!r}, expected a number above 0")
    for name, count in {"min_queries": queries, "batch": batch}.items():
        if type(count) is not int or count < 1:
            raise InvalidRequestError(f"{name} is {count!r}, expected a whole number from 1 on")
    if percentile is not None:
        _check_percentile(percentile)
    if scenario == "SingleStream" and batch > 1:
        raise InvalidRequestError(f"batch is {batch}, and SingleStream has one query at a time; leave it at 1")
    if scenario == "Server" and (rate is None or latency is None):
        raise InvalidRequestError("Server needs a target_qps and a target_latency_seconds; give both")
    if scenario != "Server" and (latency is not None or percentile is not None):
        raise InvalidRequestError(f"{scenario} has no target latency; leave it and its percentile out")


def _check_percentile(percentile: float) -> None:
    if not 0 < percentile < 1:
        raise InvalidRequestError(f"percentile is {percentile!r}, expected a share between 0 and 1, such as 0.99")


def _clear(directory: Path) -> None:
    """Make the directory, without the logs of an earlier run: they must not be taken for this one's."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (_SUMMARY, _DETAIL):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"loadgen's logs cannot be written to {directory}: {error.strerror or error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(f"loadgen wrote no {path.name} to {path.parent}: {error.strerror or error}") from error


def _verdict(summary: str, directory: Path) -> bool:
    match = re.search(r"^Result is : (VALID|INVALID)$", summary, re.MULTILINE)
    if match is None:
        raise OutputError(f"{directory / _SUMMARY} has no result; see whether the disk is full")
    return match[1] == "VALID"


def _versions(pipeline: Pipeline) -> dict[str, str]:
    found = {
        "mlcommons-loadgen": importlib.metadata.version("mlcommons-loadgen"),
        "latentrt": importlib.metadata.version("latentrt"),
        "python": platform.python_version(),
    }
    name = pipeline.engine_choice.name
    return found | {name: probe(name).version} if name in KINDS else found


def _notes(pipeline: Pipeline, duration: float, percentile: float | None) -> list[str]:
    notes = ["No official MLPerf result: model and prompts are not those of an MLPerf benchmark, accuracy was not run."]
    if duration < OFFICIAL_SECONDS:
        notes.append(f"The run was to last {duration:g} s; MLPerf asks for {OFFICIAL_SECONDS:g} s.")
    if percentile is not None:
        notes.append(f"{100 * percentile:g} % of the queries had to be in time; MLPerf asks for 99 %.")
    if len(pipeline._texts):  # nobody else needs to know
        notes.append("Texts that were encoded for one query were kept for the next, which MLPerf's rules forbid.")
    return notes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one scenario; returns the exit status: 0 if the run is valid, 1 if it is not or failed."""
    parser = argparse.ArgumentParser(
        prog="python -m latentrt.benchmarks.mlperf.loadgen", description=__doc__.split("\n")[0]
    )
    parser.add_argument("bundle", type=Path, help="directory that latentrt build-engine wrote")
    parser.add_argument("--scenario", choices=SCENARIOS, required=True)
    parser.add_argument("--engine", default="auto", help="default: %(default)s")
    parser.add_argument("--precision", help="default: the highest that the bundle has")
    parser.add_argument("--threads", type=int, default=0, help="threads inside an operator; 0 is automatic")
    parser.add_argument("--prompts", type=Path, help="file of prompts, one a line (default: a few of our own)")
    parser.add_argument("--steps", type=int, help="steps of a picture (default: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the bundle's)")
    parser.add_argument("--sampler", help="sampler (default: the bundle's)")
    parser.add_argument("--width", type=int, help="in pixels (default: the bundle's)")
    parser.add_argument("--height", type=int, help="in pixels (default: the bundle's)")
    parser.add_argument("--seed", type=int, default=0, help="of every picture's noise (default: %(default)s)")
    parser.add_argument("--duration", type=float, default=30, help="fewest seconds (default: %(default)s, MLPerf: 600)")
    parser.add_argument("--queries", type=int, help="fewest queries (default: as many as a valid run needs)")
    parser.add_argument("--qps", type=float, help="Server: queries a second; else pictures a second to expect")
    parser.add_argument("--latency", type=float, help="Server: seconds that a query must be answered in")
    parser.add_argument("--percentile", type=float, help="Server: share of queries in time (default: MLPerf's 0.99)")
    parser.add_argument("--batch", type=int, default=1, help="most pictures drawn together (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="keep loadgen's logs in this directory")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            report = _run(arguments, arguments.logs or Path(scratch))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except (LatentRTError, OSError) as error:
        print(f"loadgen: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("loadgen: interrupted", file=sys.stderr)
        return 130
    print(report["summary"].strip(), *report["notes"], sep="\n")
    return 0 if report["valid"] else 1


def _run(arguments: argparse.Namespace, directory: Path) -> LoadgenRun:
    prompts = PROMPTS if arguments.prompts is None else read_prompts(arguments.prompts)
    queries = arguments.queries
    if queries is None:
        queries = fewest_queries(arguments.scenario, arguments.percentile)
    with Pipeline.load(
        arguments.bundle, arguments.engine, precision=arguments.precision, threads=arguments.threads, prompt_cache=0
    ) as pipeline:
        return run_loadgen(
            pipeline,
            arguments.scenario,
            prompts=prompts,
            steps=arguments.steps,
            guidance=arguments.guidance,
            sampler=arguments.sampler,
            width=arguments.width,
            height=arguments.height,
            seed=arguments.seed,
            min_duration_seconds=arguments.duration,
            min_queries=queries,
            directory=directory,
            target_qps=arguments.qps,
            target_latency_seconds=arguments.latency,
            batch=arguments.batch,
            percentile=arguments.percentile,
        )


if __name__ == "__main__":
    sys.exit(main())
