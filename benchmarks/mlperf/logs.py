"""The logs of MLPerf's load generator: its verdict and its figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

from latentrt.engines.errors import OutputError

_SUMMARY, _DETAIL = "mlperf_log_summary.txt", "mlperf_log_detail.txt"

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


def clear(directory: Path) -> None:
    """Make the directory for the logs, and remove those of an earlier run from it.

    Raises:
        OutputError: if that is not possible.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (_SUMMARY, _DETAIL):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"loadgen's logs cannot be written to {directory}: {error.strerror or error}") from error


def read_summary(directory: Path) -> tuple[str, bool]:
    """The text of loadgen's summary, and whether it calls the run valid.

    Raises:
        OutputError: if there is no summary, or it has no result.
    """
    summary = _read(directory / _SUMMARY)
    match = re.search(r"^Result is : (VALID|INVALID)$", summary, re.MULTILINE)
    if match is None:
        raise OutputError(f"{directory / _SUMMARY} has no result; see whether the disk is full")
    return summary, match[1] == "VALID"


def read_detail(directory: Path) -> dict[str, float]:
    """The figures of loadgen's detailed log; errors as for :func:`parse_detail`."""
    return parse_detail(_read(directory / _DETAIL))


def parse_detail(text: str) -> dict[str, float]:
    """Figures from the text of loadgen's ``mlperf_log_detail.txt``: counts, rates per second, times in seconds.

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
    # Zero stands for an estimate that needs more queries.
    found |= {ours: values[key] / 1e9 for key, ours in _NANOSECONDS.items() if values.get(key)}
    for key, value in values.items():
        if match := _PERCENTILE.fullmatch(key):
            found[f"latency_p{float(match[1]):g}_seconds"] = value / 1e9
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(f"loadgen wrote no {path.name} to {path.parent}: {error.strerror or error}") from error
