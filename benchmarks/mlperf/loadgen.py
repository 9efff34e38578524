"""Run MLPerf's scenarios SingleStream, Offline and Server: its load generator asks and judges, a pipeline draws.

    python -m latentrt.benchmarks.mlperf.loadgen BUNDLE --scenario SingleStream [--steps N] [--duration S] [--json FILE]

Loadgen (https://github.com/mlcommons/inference/tree/master/loadgen) decides when a query comes, measures the time
from then until its image is in host memory, and says whether the run is valid. It has a process of its own,
:mod:`latentrt.benchmarks.mlperf.process`; the pipeline runs in the calling thread. So an exception of the pipeline, or
Ctrl-C, ends the run at once.

- SingleStream: the next query comes when the last one was answered. The result is a percentile of the latency.
- Offline: all queries come at once. The result is images per second.
- Server: queries come at random, as a Poisson process. The run is valid if enough of them were answered in time.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError, LatentRTError
from latentrt.engines.kinds import KINDS
from latentrt.exporter.precision.calibration import PROMPTS, read_prompts
from latentrt.runtime.components.engine_probe import probe
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request.options import RequestOptions

from ..machine import system_facts, versions
from ..program import make_parser, write_json
from . import logs
from .answerer import Answerer
from .driver import LoadgenProcess
from .terms import SCENARIOS, Terms, fewest_queries

OFFICIAL_SECONDS = 600.0
"""Shortest run that MLPerf accepts as a submission (``min_duration`` in loadgen's ``mlperf.conf``)."""

_SLACK = 1.25  # expected rate over measured rate, so that a run does not end before its shortest duration
_REPORTED = ("steps", "guidance", "sampler", "width", "height", "seed")


class LoadgenRun(TypedDict):
    """The report of one run.

    Keys:
        scenario: One of :data:`~latentrt.benchmarks.mlperf.terms.SCENARIOS`.
        valid: Whether loadgen calls the run valid.
        result: Loadgen's numbers: counts, rates per second, latencies in seconds.
        summary: The text of its ``mlperf_log_summary.txt``.
        versions: Versions of loadgen, Python, LatentRT and the engine's SDK.
        settings: The request, batch, warm-up, expected rate, and loadgen's settings.
        notes: Remarks about the figures, a sentence each.
    """

    scenario: str
    valid: bool
    result: dict[str, float]
    summary: str
    versions: dict[str, str]
    settings: dict[str, Any]
    notes: list[str]


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
        pipeline: The pipeline that draws. MLPerf forbids keeping results from one query for the next: load it with
            ``prompt_cache=0``.
        scenario: One of :data:`~latentrt.benchmarks.mlperf.terms.SCENARIOS`.
        prompts: The prompts that loadgen chooses from; a query is one prompt and one image.
        steps: Sampler steps; ``None`` for the bundle's default, as for the four that follow.
        guidance: Guidance scale.
        sampler: Name of the sampler.
        width: Width of the images in pixels.
        height: Height of the images in pixels.
        seed: Seed of every image's noise.
        min_duration_seconds: Shortest duration of the run.
        min_queries: Fewest queries of the run; :func:`~latentrt.benchmarks.mlperf.terms.fewest_queries` says how many
            a valid run needs.
        directory: The directory for loadgen's logs; earlier ones are replaced.
        target_qps: Server: queries a second. Else images a second to expect, from which loadgen computes how many
            queries fill the duration; ``None`` for 1.25 times the fastest of the warm-up.
        target_latency_seconds: Server: the latency above which a query is late.
        batch: Offline and Server: most images that are drawn together. They join and leave between steps.
        percentile: Server: share of queries that must not be late; ``None`` is MLPerf's 0.99.

    Raises:
        InvalidRequestError: if an argument is out of range or does not belong to the scenario.
        EngineUnavailableError: if loadgen is not installed.
        EngineError: if an engine fails, or loadgen does.
        OutputError: if loadgen could not write its logs.
    """
    terms = Terms(scenario, min_duration_seconds, min_queries, target_qps, target_latency_seconds, batch, percentile)
    if not prompts:
        raise InvalidRequestError("there are no prompts to draw; give at least one")
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise EngineUnavailableError(
            "mlperf_loadgen is not installed, which MLPerf's scenarios need; "
            'install it with: pip install "latentrt[bench]"'
        )
    options: RequestOptions = {"steps": steps, "guidance": guidance, "sampler": sampler, "seed": seed, "images": 1}
    options |= {"width": width, "height": height}
    answerer = Answerer(pipeline, prompts, options, batch)
    run = answerer.warm_up(0.0 if target_qps else min(2.0, 0.1 * min_duration_seconds))
    expected = target_qps or _SLACK * batch / min(answerer.warm_ups)
    settings = terms.settings(expected)
    logs.clear(directory)
    with LoadgenProcess() as loadgen:
        loadgen.begin(
            {"scenario": scenario, "samples": len(prompts), "directory": str(directory), "settings": settings}
        )
        answerer.answer(loadgen)
    summary, valid = logs.read_summary(directory)
    asked = {name: getattr(run.request, name) for name in _REPORTED}
    return {
        "scenario": scenario,
        "valid": valid,
        "result": logs.read_detail(directory),
        "summary": summary,
        "versions": _versions(pipeline),
        "settings": {
            "engine": pipeline.engine_choice.name,
            "prompts": len(prompts),
            **asked,
            "batch": batch,
            "warm_up_seconds": answerer.warm_ups,
            "expected_samples_per_second": expected,
            "loadgen": settings,
        },
        "notes": _notes(pipeline, terms),
    }


def _versions(pipeline: Pipeline) -> dict[str, str]:
    found = {**versions("mlcommons-loadgen", "latentrt"), "python": system_facts()["python"]}
    name = pipeline.engine_choice.name
    return found | {name: probe(name).version} if name in KINDS else found


def _notes(pipeline: Pipeline, terms: Terms) -> list[str]:
    duration, percentile = terms.min_duration_seconds, terms.percentile
    notes = [
        "No official MLPerf result: model and prompts are not those of an MLPerf benchmark, and accuracy was not run."
    ]
    if duration < OFFICIAL_SECONDS:
        notes.append(f"The run was to last {duration:g} s; MLPerf asks for {OFFICIAL_SECONDS:g} s.")
    if percentile is not None:
        notes.append(f"{100 * percentile:g} % of the queries had to be in time; MLPerf asks for 99 %.")
    if pipeline.cached_prompts:
        notes.append("Texts that were encoded for one query were kept for the next, which MLPerf's rules forbid.")
    return notes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one scenario; returns the exit status: 0 if the run is valid, 1 if it is not or failed."""
    parser = make_parser("mlperf.loadgen", __doc__)
    parser.add_argument("bundle", type=Path, help="directory that latentrt build-engine wrote")
    parser.add_argument("--scenario", choices=SCENARIOS, required=True, help="the scenario to run")
    parser.add_argument("--engine", default="auto", help="default: %(default)s")
    parser.add_argument("--precision", help="default: the highest that the bundle has")
    parser.add_argument("--threads", type=int, default=0, help="threads inside an operator; 0 is automatic")
    parser.add_argument("--prompts", type=Path, help="file of prompts, one a line (default: a few built-in ones)")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the bundle's)")
    parser.add_argument("--sampler", help="sampler (default: the bundle's)")
    parser.add_argument("--width", type=int, help="width in pixels (default: the bundle's)")
    parser.add_argument("--height", type=int, help="height in pixels (default: the bundle's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every image's noise (default: %(default)s)")
    parser.add_argument(
        "--duration", type=float, default=30, help="shortest run in seconds (default: %(default)s; MLPerf asks for 600)"
    )
    parser.add_argument("--queries", type=int, help="fewest queries (default: as many as a valid run needs)")
    parser.add_argument("--qps", type=float, help="Server: queries a second; else images a second to expect")
    parser.add_argument("--latency", type=float, help="Server: seconds after which a query is late")
    parser.add_argument("--percentile", type=float, help="Server: share of queries in time (default: MLPerf's 0.99)")
    parser.add_argument("--batch", type=int, default=1, help="most images drawn together (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="keep loadgen's logs in this directory")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            report = _run(arguments, arguments.logs or Path(scratch))
        write_json(arguments.json, report)
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
