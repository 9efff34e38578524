"""``latentrt doctor``: show what can run here, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.trt import SDK_MODULES, load_sdk
from latentrt.engines.trt.cuda import cuda_devices

from ..components.engine_choice import AUTO
from ..components.engine_probe import MISSING, PRESENT, SUPPORTED, probe
from .console import print_json, table

_EXPORT_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True)
class Finding:
    """The state of one ability of this machine.

    Attributes:
        name: Engine, or ``"export"``.
        state: ``"present"``, ``"missing"`` (something must be installed) or ``"unusable"`` (it cannot run here).
        version: Version of its SDK, empty where there is none.
        runs: Whether it can draw images here.
        builds: Whether it can build engines here.
        detail: The device that it runs on; or the missing package and how to get it; or the reason why it cannot run.
    """

    name: str
    state: str
    version: str
    runs: bool
    builds: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print whatever a build or a run may need, and its state here."""
    findings = [*(_engine(name) for name in SUPPORTED), _export()]
    auto = _auto(findings)
    machine = {
        "latentrt": importlib.metadata.version("latentrt"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "gpus": [f"{device.name} ({device.architecture})" for device in cuda_devices()],
    }
    if arguments.json:
        print_json({"machine": machine, "engines": [asdict(finding) for finding in findings], "auto": auto})
        return 0
    for key, value in machine.items():
        print(f"{key}: {', '.join(value) or 'none' if isinstance(value, list) else value}")
    rows = [
        (f.name, f.state, f.version or "-", "yes" if f.runs else "no", "yes" if f.builds else "no", f.detail)
        for f in findings
    ]
    print("\n" + table(("engine", "state", "version", "runs", "builds", ""), rows))
    with_plans = "".join(f"{name} where a bundle has plans for this GPU, else " for name in auto["with_plans"])
    print(f"\nauto: {with_plans}{auto['otherwise'] or 'nothing can run here'}")
    return 0


def _engine(name: str) -> Finding:
    found = probe(name)
    builds = found.state == PRESENT
    if name in SDK_MODULES and not builds:
        try:
            builds = load_sdk(name).builds_without_gpu
        except EngineUnavailableError:
            builds = False
    return Finding(name, found.state, found.version, found.state == PRESENT, builds, found.detail)


def _auto(findings: Sequence[Finding]) -> dict[str, Any]:
    """The choices of ``"auto"``: engines that need plans in the bundle, and the first that needs none."""
    running = [name for name in AUTO if any(f.name == name and f.runs for f in findings)]
    plain = [name for name in running if name not in SDK_MODULES]
    return {"with_plans": [name for name in running if name in SDK_MODULES], "otherwise": plain[0] if plain else None}


def _export() -> Finding:
    missing = []
    for package in _EXPORT_PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding(
            "export",
            MISSING,
            "",
            False,
            False,
            f'{missing[0]} is missing; install it with: pip install "latentrt[export]"',
        )
    return Finding("export", PRESENT, importlib.metadata.version("torch"), False, True, "torch to ONNX")
