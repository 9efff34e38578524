"""MLPerf's load generator in a process of its own, which :mod:`latentrt.benchmarks.mlperf.driver` starts.

Loadgen's loop in C++ cannot be interrupted: it sleeps until a query is due and waits for the last answer, whatever
signals or exceptions there are. A process can be ended at any time. It also has an interpreter of its own, so that
queries are due on time while the other process computes.

Both sides write one JSON object a line. Input: first the job, see :func:`main`, then ``{"done": [id, ...]}`` for
queries that were answered. Output: ``{"queries": [[id, index], ...]}`` for queries that are due, at last
``{"over": true}``. The file imports only the standard library and ``mlperf_loadgen``, so that it starts fast.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any, TextIO

import mlperf_loadgen


def main() -> int:
    """Run one test; returns the exit status.

    The first line has ``scenario``, ``samples`` (how many prompts there are), ``directory`` (for the logs) and
    ``settings``: fields of loadgen's ``TestSettings`` that differ from those of MLPerf's configuration file.
    """
    # Ctrl-C reaches every process of a terminal; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what loadgen prints must not mix with the answers
    job = json.loads(sys.stdin.readline())
    over = threading.Event()
    reader = threading.Thread(target=_complete, args=(sys.stdin, over))
    reader.start()

    def issue(queries: list[Any]) -> None:
        _say(answers, {"queries": [[query.id, query.index] for query in queries]})

    system = mlperf_loadgen.ConstructSUT(issue, _nothing)
    # The parent holds all prompts from the beginning, so there is nothing to load.
    library = mlperf_loadgen.ConstructQSL(job["samples"], job["samples"], _nothing, _nothing)
    # The last argument names no audit.config: one in the current directory must not be read.
    mlperf_loadgen.StartTestWithLogSettings(system, library, _settings(job), _log_settings(job["directory"]), "")
    over.set()
    _say(answers, {"over": True})
    reader.join()
    mlperf_loadgen.DestroyQSL(library)
    mlperf_loadgen.DestroySUT(system)
    return 0


def _nothing(*_: object) -> None:
    """Do nothing, as a callback."""


def _complete(lines: TextIO, over: threading.Event) -> None:
    """Pass answers on to loadgen until the parent has no more."""
    for line in lines:
        # Loadgen reads images in its accuracy mode only; here they stay in the parent.
        done = [mlperf_loadgen.QuerySampleResponse(number, 0, 0) for number in json.loads(line)["done"]]
        mlperf_loadgen.QuerySamplesComplete(done)
    if not over.is_set():
        os._exit(1)  # the parent is gone, and loadgen would wait forever


def _settings(job: Mapping[str, Any]) -> Any:
    settings = mlperf_loadgen.TestSettings()
    # The configuration file that is part of the package (0), as for any model: seeds, percentiles, limits.
    if status := settings.FromConfig("", "*", job["scenario"], 0):
        raise RuntimeError(f"loadgen's own mlperf.conf could not be read, status {status}")
    settings.scenario = getattr(mlperf_loadgen.TestScenario, job["scenario"])
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    for name, value in job["settings"].items():
        setattr(settings, name, value)
    return settings


def _log_settings(directory: str) -> Any:
    output = mlperf_loadgen.LogOutputSettings()
    output.outdir = directory
    settings = mlperf_loadgen.LogSettings()
    settings.log_output = output
    settings.enable_trace = False
    return settings


def _say(answers: TextIO, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
