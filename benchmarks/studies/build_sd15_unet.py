"""Measure time and peak memory of exporting Stable Diffusion 1.5's U-Net, and of building its plan.

    python -m latentrt.benchmarks.studies.build_sd15_unet [--size sd15|tiny] [--engine tensorrt-rtx|tensorrt] [--json
    FILE]

Weights are random, seeded, in fp16: neither step depends on their values. The export to ONNX and the build of the plan
run in a process of their own each, since the operating system counts peak memory by process; the process that builds
imports no torch. The exit status is 1 if the build takes more than 5 minutes or 10 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.engines import TensorSpec
from latentrt.engines.errors import LatentRTError
from latentrt.engines.trt import SDK_MODULES, BuildOptions, Profile, build_plan, build_target, load_sdk, parse_ranges

from ..checkpoints.stable_diffusion import CONFIGS
from ..machine import system_facts
from ..program import make_parser, write_json

if TYPE_CHECKING:
    import torch

RANGES = ("batch=1:2:8", "latent_height=32:64:128", "latent_width=32:64:128")
"""Up to 4 images with guidance, of 256 to 1024 pixels a side, tuned for one image of 512."""

LIMIT_SECONDS = 300.0
"""Most seconds that the build may take."""

LIMIT_BYTES = 10_000_000_000
"""Most memory that the build may take."""

_FP16_MAX = 65504.0
_REPORT = "report.json"


@dataclass(frozen=True)
class Step:
    """Time, memory and output of one process.

    Attributes:
        name: ``"export"`` or ``"build"``.
        seconds: Wall time of the process, its imports included.
        peak_bytes: Its largest resident set.
        output_bytes: Size of the files that it wrote.
    """

    name: str
    seconds: float
    peak_bytes: int
    output_bytes: int


def export(directory: Path, size: str, seed: int) -> dict[str, Any]:
    """Make the U-Net, check that it stays within fp16, and export it to ``directory``.

    Returns:
        Entries of the report: parameters, the largest activation, the graph's file and inputs.

    Raises:
        OverflowError: if an activation leaves the range of fp16.
        ExportError: if the export fails.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from latentrt.exporter.components import Component, Denoiser
    from latentrt.exporter.graphs.export import export_component
    from latentrt.exporter.graphs.targets import form_for

    torch.manual_seed(seed)
    config = CONFIGS[size]
    # The default initialisation draws from +-1/sqrt(fan-in): with the normalisations between, activations stay small.
    unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    example = {
        "sample": torch.randn(2, config["in_channels"], 16, 24),
        "timestep": torch.tensor([1.0, 999.0]),
        "encoder_hidden_states": torch.randn(2, 77, config["cross_attention_dim"]),
    }
    largest = _largest_activation(unet, example)
    if not largest < _FP16_MAX:
        raise OverflowError(f"the largest activation is {largest:g}; fp16 ends at {_FP16_MAX:g}; choose another seed")
    latents = {0: "batch", 2: "latent_height", 3: "latent_width"}
    dynamic = {"sample": latents, "timestep": {0: "batch"}, "encoder_hidden_states": {0: "batch"}}
    component = Component("unet", Denoiser(unet), example, dynamic, ("out_sample",), frozenset({"timestep"}))
    graph = export_component(component, form_for("tensorrt-rtx", "fp16"), directory)
    return {
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "largest_activation": largest,
        "graph": graph.file,
        "precision": graph.precision,
        "opset": graph.opset,
        "inputs": [asdict(spec) for spec in graph.inputs],
    }


def _largest_activation(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    """The largest magnitude among the outputs of a module's layers for some inputs."""
    import torch

    largest = 0.0

    def watch(layer: Any, arguments: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, float(output.abs().max()))

    hooks = [layer.register_forward_hook(watch) for layer in module.modules()]
    module(**inputs)
    for hook in hooks:
        hook.remove()
    return largest


def build(directory: Path, engine: str) -> dict[str, Any]:
    """Build the plan of the graph that :func:`export` wrote to ``directory``.

    Returns:
        Entries of the report: SDK, target, profile, and the plan's file.

    Raises:
        EngineError: if the SDK is missing or fails.
    """
    exported = json.loads((directory / _REPORT).read_text(encoding="utf-8"))
    inputs = [TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in exported["inputs"]]
    profile = Profile.of(inputs, parse_ranges(RANGES))
    sdk = load_sdk(engine)
    options = BuildOptions()
    build_plan(sdk, directory / exported["graph"], directory / "unet.plan", profile, options=options, on_progress=_show)
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported by the process that builds")
    return {"sdk": sdk.title, "target": build_target(sdk, options), "profile": profile.as_shapes(), "plan": "unet.plan"}


def _show(phase: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done / total:6.1%} {phase[:60]:60}", end=end, file=sys.stderr, flush=True)


def _run_step(name: str, directory: Path, arguments: argparse.Namespace) -> tuple[Step, dict[str, Any]]:
    """Run one step in a process of its own and take its figures from the operating system."""
    command = [sys.executable, "-m", "latentrt.benchmarks.studies.build_sd15_unet", "--step", name]
    command += ["--directory", str(directory)]
    command += ["--size", arguments.size, "--engine", arguments.engine, "--seed", str(arguments.seed)]
    before = _bytes_in(directory)
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the {name} step failed with status {process.returncode}; its message is above")
    unit = 1 if sys.platform == "darwin" else 1024
    report = json.loads((directory / _REPORT).read_text(encoding="utf-8"))
    return Step(name, round(seconds, 2), usage.ru_maxrss * unit, _bytes_in(directory) - before), report


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and path.name != _REPORT)


def measure(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both steps in ``directory``; returns the report."""
    steps = []
    details: dict[str, Any] = {}
    for name in ("export", "build"):
        step, report = _run_step(name, directory, arguments)
        steps.append(step)
        details |= report
    plan = steps[1]
    return {
        "size": arguments.size,
        "engine": arguments.engine,
        "seed": arguments.seed,
        "machine": system_facts(),
        **details,
        "steps": [asdict(step) for step in steps],
        "within_limits": plan.seconds <= LIMIT_SECONDS and plan.peak_bytes <= LIMIT_BYTES,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"U-Net ({report['size']}), {report['parameters'] / 1e6:.0f} M parameters, {report['precision']}, "
        f"opset {report['opset']}; {report['sdk']} for {report['target']}; {report['machine']['cpus']} CPUs",
        "",
        "| step   | time (s) | peak memory (GB) | output (GB) |",
        "|--------|---------:|-----------------:|------------:|",
    ]
    for step in report["steps"]:
        peak, output = step["peak_bytes"] / 1e9, step["output_bytes"] / 1e9
        lines.append(f"| {step['name']:6} | {step['seconds']:8.1f} | {peak:16.2f} | {output:11.3f} |")
    verdict = "within" if report["within_limits"] else "BEYOND"
    lines += ["", f"The build is {verdict} the limits of {LIMIT_SECONDS:.0f} s and {LIMIT_BYTES / 1e9:.0f} GB."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or, in a process that it started, one of its steps; returns the exit status."""
    parser = make_parser("studies.build_sd15_unet", __doc__)
    parser.add_argument("--size", choices=CONFIGS, default="sd15", help="default: %(default)s")
    parser.add_argument("--engine", choices=SDK_MODULES, default="tensorrt-rtx", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.add_argument(
        "--directory", type=Path, help="keep graph and plan here, in an empty directory (default: keep neither)"
    )
    parser.add_argument("--step", choices=("export", "build"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.step:
        return _step(arguments)
    if arguments.directory is not None:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        if any(arguments.directory.iterdir()):
            parser.error(f"{arguments.directory} is not empty; name an empty or a new directory")
        report = measure(arguments.directory, arguments)
    else:
        with tempfile.TemporaryDirectory(prefix="latentrt-") as name:
            report = measure(Path(name), arguments)
    print(table(report))
    write_json(arguments.json, report)
    return 0 if report["within_limits"] else 1


def _step(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.directory
    try:
        if arguments.step == "export":
            report = export(directory, arguments.size, arguments.seed)
        else:
            report = build(directory, arguments.engine)
    except (LatentRTError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (directory / _REPORT).write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
