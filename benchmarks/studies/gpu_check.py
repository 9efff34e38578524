"""Check and time everything that plans do on a GPU, in one run on a machine that has one.

    python -m latentrt.benchmarks.studies.gpu_check BUNDLE [--engine tensorrt-rtx] [--steps N] [--rounds N] [--json
    FILE]

The bundle must have been built with that engine. Outputs of plans are compared with ONNX Runtime on the CPU; CUDA
graphs, the loop's state on the device, refitting, weight streaming, the runtime cache and threads are compared with the
plain way to do the same. Every check passes, fails, or is skipped for a stated reason. Times hold for this machine
only; the raw samples are in the report.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latentrt.engines.errors import LatentRTError
from latentrt.engines.trt import SDK_MODULES, load_sdk
from latentrt.engines.trt.cuda import cuda_devices
from latentrt.engines.trt.cudart import load_cuda
from latentrt.runtime.bundle.reader import Bundle

from ..machine import system_facts
from ..program import at_least, make_parser, write_json
from .gpu import pipeline_checks, plan_checks
from .gpu.outcome import Check, Skipped
from .gpu.subject import Subject


def run_checks(subject: Subject) -> list[Check]:
    """Run all checks; a check that fails does not stop the others."""
    checks: list[Check] = []

    def run(name: str, work: Callable[[Check], None]) -> None:
        check = Check(name)
        checks.append(check)
        try:
            work(check)
        except Skipped as reason:
            check.status, check.detail = "skipped", str(reason)
        except (LatentRTError, AssertionError) as error:
            check.status, check.detail = "fail", " ".join(str(error).split())

    with subject.load() as pipe:
        for name, engine in pipe.engines.items():
            run(f"component {name}", functools.partial(pipeline_checks.component, subject, name, engine))
        for name, work in (
            ("pictures", pipeline_checks.images),
            ("CUDA graphs", pipeline_checks.cuda_graphs),
            ("state on the device", pipeline_checks.resident_state),
            ("threads", pipeline_checks.threads),
            ("latency", pipeline_checks.latency),
            ("memory", pipeline_checks.memory),
        ):
            run(name, functools.partial(work, subject, pipe))
    for name, alone in (
        ("runtime cache", plan_checks.runtime_cache),
        ("refit", plan_checks.refit),
        ("weight streaming", plan_checks.weight_streaming),
        ("opening and closing", plan_checks.leaks),
    ):
        run(name, functools.partial(alone, subject))
    return checks


def describe_machine(engine: str) -> dict[str, Any]:
    """The GPU, the driver, the SDK and the system that the figures hold for."""
    device = cuda_devices()[0]
    runtime = load_cuda()
    driver = Path("/proc/driver/nvidia/version")
    return {
        "gpu": device.name,
        "architecture": device.architecture,
        "driver": driver.read_text().splitlines()[0].strip() if driver.exists() else None,
        "driver_cuda": runtime.cudaDriverGetVersion()[1],
        "cuda_runtime": runtime.cudaRuntimeGetVersion()[1],
        "sdk": load_sdk(engine).title,
        **system_facts(),
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for people: a line for each check, and how many passed."""
    machine = report["machine"]
    width = max(len(check["name"]) for check in report["checks"])
    lines = [f"{report['model']} on {machine['gpu']} ({machine['architecture']}), {machine['sdk']}", ""]
    lines += [f"{check['status']:7}  {check['name']:{width}}  {check['detail']}" for check in report["checks"]]
    counts = {status: sum(c["status"] == status for c in report["checks"]) for status in ("pass", "fail", "skipped")}
    return "\n".join([*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items())])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit status, 1 if one failed or none could be run."""
    parser = make_parser("studies.gpu_check", __doc__)
    parser.add_argument("bundle", type=Path, help="a bundle that was built with --engine tensorrt-rtx or tensorrt")
    parser.add_argument("--engine", choices=sorted(SDK_MODULES), default="tensorrt-rtx", help="default: %(default)s")
    parser.add_argument("--steps", type=at_least(1), default=8, help="steps of an image (default: %(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=10, help="samples of each time (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not cuda_devices():
        print("gpu_check needs an NVIDIA GPU and its driver, and no CUDA device was found here", file=sys.stderr)
        return 1
    try:
        report = _run(arguments)
    except LatentRTError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    print(table(report))
    write_json(arguments.json, report)
    return int(any(check["status"] == "fail" for check in report["checks"]))


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    bundle = Bundle.open(arguments.bundle)
    machine = describe_machine(arguments.engine)
    subject = Subject(bundle, arguments.engine, steps=arguments.steps, rounds=arguments.rounds)
    checks = run_checks(subject)
    return {
        "model": bundle.manifest.source.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "tools": bundle.manifest.tools,
        "arguments": {"engine": arguments.engine, "steps": arguments.steps, "rounds": arguments.rounds},
        "seconds": time.perf_counter() - begin,
        "checks": [asdict(check) for check in checks],
    }


if __name__ == "__main__":
    sys.exit(main())
