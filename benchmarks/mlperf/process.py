"""MLPerf's load generator in a process of its own; :mod:`latentrt.benchmarks.mlperf.loadgen` starts it.

Once begun, loadgen's loop in C++ comes to its own end and no other: it sleeps until a query is due and waits for the
last answer, whatever signals or exceptions there are. A process can be ended at any time. It also has an interpreter
of its own, so that queries are due on time while the other process computes.

One JSON object a line. In: first what to run, see :func:`main`, then ``{"done": [id, ...]}`` for queries that were
answered. Out: ``{"queries": [[id, index], ...]}`` for queries that are due, at last ``{"over": true}``. Standard
library and ``mlperf_loadgen`` only: it runs as a file, and starts in a moment.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # reaches every process of a terminal; the parent decides what ends
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what loadgen prints is no answer
    job = json.loads(sys.stdin.readline())
    over = threading.Event()
    reader = threading.Thread(target=_complete, args=(sys.stdin, over))
    reader.start()

    def issue(queries: list[Any]) -> None:
        _say(answers, {"queries": [[query.id, query.index] for query in queries]})

    system = mlperf_loadgen.ConstructSUT(issue, _nothing)
    # Prompts are in the parent's memory from the beginning.
    library = mlperf_loadgen.ConstructQSL(job["samples"], job["samples"], _nothing, _nothing)
    # No audit.config of whatever directory this is.
    mlperf_loadgen.StartTestWithLogSettings(system, library, _settings(job), _log_settings(job["directory"]), "")
    over.set()
    _say(answers, {"over": True})
    reader.join()
    mlperf_loadgen.DestroyQSL(library)
    mlperf_loadgen.DestroySUT(system)
    return 0


def _nothing(*_: object) -> None:
    """For callbacks that have nothing to do."""


def _complete(lines: TextIO, over: threading.Event) -> None:
    """Tell loadgen of answers until the parent has no more."""
    for line in lines:
        # Loadgen reads pictures in its accuracy mode alone; here they stay where they were drawn.
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
