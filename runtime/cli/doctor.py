"""``latentrt doctor``: show what can run here, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass

from latentrt.engines import onnxrt, ov
from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.trt import SDK_MODULES, load_sdk
from latentrt.engines.trt.cuda import cuda_devices

from .console import print_json, table

_EXPORT_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True)
class Finding:
    """What was found of one ability.

    Attributes:
        name: Engine, or ``"export"``.
        version: Version of its SDK, empty where there is none.
        runs: Whether it can draw pictures here.
        builds: Whether it can build engines here.
        detail: What is missing, and how to get it.
    """

    name: str
    version: str
    runs: bool
    builds: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look at everything that a build or a run may need."""
    findings = [_onnxruntime(), _openvino(), *(_tensorrt(name) for name in SDK_MODULES), _export()]
    machine = {
        "latentrt": importlib.metadata.version("latentrt"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "gpus": [f"{device.name} ({device.architecture})" for device in cuda_devices()],
    }
    if arguments.json:
        print_json({"machine": machine, "engines": [asdict(finding) for finding in findings]})
        return 0
    for key, value in machine.items():
        print(f"{key}: {', '.join(value) or 'none' if isinstance(value, list) else value}")
    rows = [
        (f.name, f.version or "-", "yes" if f.runs else "no", "yes" if f.builds else "no", f.detail) for f in findings
    ]
    print("\n" + table(("engine", "version", "runs", "builds", ""), rows))
    return 0


def _onnxruntime() -> Finding:
    try:
        sdk = onnxrt.load_sdk()
    except EngineUnavailableError as error:
        return Finding("onnxruntime", "", False, False, str(error))
    return Finding("onnxruntime", sdk.__version__, True, True, "CPU")


def _openvino() -> Finding:
    try:
        sdk = ov.load_sdk()
    except EngineUnavailableError as error:
        return Finding("openvino", "", False, False, str(error))
    abilities = ov.load_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = [precision for precision in ("FP32", "BF16") if precision in abilities]
    return Finding("openvino", sdk.__version__.partition("-")[0], True, True, f"CPU: {', '.join(precisions).lower()}")


def _tensorrt(name: str) -> Finding:
    try:
        sdk = load_sdk(name)
    except EngineUnavailableError as error:
        return Finding(name, "", False, False, str(error))
    has_gpu = bool(cuda_devices())
    detail = (
        "running needs an NVIDIA GPU; none was found"
        if not has_gpu
        else "this version builds plans and does not run them"
    )
    return Finding(name, sdk.version, False, has_gpu or sdk.builds_without_gpu, detail)


def _export() -> Finding:
    missing = []
    for package in _EXPORT_PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding(
            "export", "", False, False, f'{missing[0]} is missing; install it with: pip install "latentrt[export]"'
        )
    return Finding("export", importlib.metadata.version("torch"), False, True, "torch to ONNX")
