"""What a step of the denoising loop takes: fused against plain, interleaved in one run, and the host's share of it.

    python -m latentrt.benchmarks.studies.step_time BUNDLE [--rounds N] [--json FILE]

Both loops take guided steps of the same run with ONNX Runtime, in turn (A B A B), so that what else the machine does
meets both. The host's share is what a step takes outside the engine: scaling, guidance and update in numpy for the
plain loop, inputs for the fused one. :mod:`latentrt.benchmarks.checkpoints.stable_diffusion` writes a model of Stable
Diffusion 1.5's size to build the bundle from.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine, TensorSpec
from latentrt.engines.onnxrt import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.onnx_guard import summarize
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.denoising.fused import FusedLoop
from latentrt.runtime.denoising.latent_preparation import start_run
from latentrt.runtime.denoising.loop import Loop
from latentrt.runtime.denoising.plain import PlainLoop
from latentrt.runtime.denoising.run import Run
from latentrt.runtime.request.request import Request
from latentrt.runtime.samplers import compile_plan

PARTS = ("unet", "unet_prompt", "unet_schedule", "unet_step")
FORM = "opset20-fp32"
_TOKENS = 77  # of a prompt of one chunk
_SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear"}


class Timed:
    """An engine whose :meth:`run` is timed."""

    def __init__(self, engine: Engine) -> None:
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self.seconds = 0.0
        self._engine = engine

    def open(self) -> Timed:
        """It is open already."""
        return self

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Pass on."""
        self._engine.bind(feeds)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Pass on, and add what it took."""
        begin = time.perf_counter()
        try:
            return self._engine.run(feeds)
        finally:
            self.seconds += time.perf_counter() - begin

    def close(self) -> None:
        """Pass on."""
        self._engine.close()


@dataclass
class Samples:
    """Seconds of every step of one loop, and how much of each was outside the engine."""

    step: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


def measure(
    paths: Mapping[str, Path], *, side: int, rounds: int, images: int, threads: int, warm_up: int = 1
) -> dict[str, Any]:
    """Time both loops.

    Args:
        paths: Graphs of :data:`PARTS`; prompt and schedule may be missing.
        side: Height and width of the latents.
        rounds: Steps that each loop takes.
        images: Pictures in the batch.
        threads: Threads inside an operator; 0 is automatic.
        warm_up: Steps before that, which are not counted.
    """
    with ExitStack() as stack:
        options = OnnxRuntimeOptions(threads=threads)
        opened = {
            name: stack.enter_context(OnnxRuntimeEngine(path, options, label=name)) for name, path in paths.items()
        }
        engines = {name: Timed(engine) for name, engine in opened.items()}
        loops: dict[str, tuple[Loop, Timed]] = {
            "plain": (PlainLoop(engines["unet"]), engines["unet"]),
            "fused": (
                FusedLoop(engines["unet_step"], engines.get("unet_prompt"), engines.get("unet_schedule")),
                engines["unet_step"],
            ),
        }
        channels = engines["unet"].inputs["sample"].shape[1]
        length, width = engines["unet"].inputs["encoder_hidden_states"].shape[1:]
        shape = (images, int(channels), side, side)
        generator = np.random.default_rng(0)
        tokens = length if isinstance(length, int) else _TOKENS
        texts = [generator.standard_normal((1, tokens, int(width)), np.float32) for _ in range(2)]
        runs = {
            name: begin_run(loop, _SCHEDULER, texts, shape, warm_up + rounds, 7.5) for name, (loop, _) in loops.items()
        }
        samples = {name: Samples() for name in loops}
        for turn in range(warm_up + rounds):
            for name, (loop, engine) in loops.items():
                engine.seconds, begin = 0.0, time.perf_counter()
                loop.advance([runs[name]])
                seconds = time.perf_counter() - begin
                if turn >= warm_up:
                    samples[name].step.append(seconds)
                    samples[name].host.append(seconds - engine.seconds)
        reference = runs["plain"].latents
        difference = float(np.linalg.norm(runs["fused"].latents - reference) / np.linalg.norm(reference))
        pairs = zip(samples["plain"].step, samples["fused"].step, strict=True)
        return {
            "latents": list(shape),
            "rounds": rounds,
            "samples": {name: asdict(each) for name, each in samples.items()},
            "plain_over_fused": median(plain / fused for plain, fused in pairs),
            "relative_difference": difference,
            "stages": {
                name: asdict(summarize(path)) | {"outputs": len(engines[name].outputs)} for name, path in paths.items()
            },
        }


def begin_run(
    loop: Loop,
    scheduler: Mapping[str, Any],
    texts: Sequence[NDArray[np.float32]],
    shape: tuple[int, int, int, int],
    steps: int,
    guidance: float,
) -> Run:
    """A run of Euler's method that has begun, with texts that are given as states of a text encoder.

    Args:
        loop: The loop that will take it further.
        scheduler: A scheduler's configuration.
        texts: Of the unconditional and the conditional text, fp32 ``[1, tokens, width]`` each.
        shape: Of the latents, ``[images, channels, h, w]``.
        steps: Steps of the run.
        guidance: Guidance scale.
    """
    plan = compile_plan("euler", scheduler, steps)
    images, _, height, width = shape
    request = Request("", "", steps, guidance, 0, "euler", width, height, images, 0)
    run = start_run(request, plan, [loop.condition({"encoder_hidden_states": text}) for text in texts], shape)
    loop.begin(run)
    return run


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    shape = "x".join(map(str, report["latents"]))
    lines = [
        f"{report['model']}, latents {shape}, guidance on; {report['machine']['cpus']} CPUs, ONNX Runtime fp32",
        "",
        "| loop  | step (ms), median | host (ms), median |",
        "|-------|------------------:|------------------:|",
    ]
    for name, samples in report["samples"].items():
        step, host = 1e3 * median(samples["step"]), 1e3 * median(samples["host"])
        lines.append(f"| {name:5} | {step:17.1f} | {host:17.3f} |")
    lines += [
        "",
        f"Step by step the plain loop takes {report['plain_over_fused']:.3f} times what the fused one takes (median of "
        f"{report['rounds']} pairs); the latents differ by {report['relative_difference']:.1e} (relative) at the end.",
        "",
        "| graph         | nodes |     weights | outputs |",
        "|---------------|------:|------------:|--------:|",
    ]
    for name, stage in report["stages"].items():
        lines.append(f"| {name:13} | {stage['nodes']:5,} | {stage['weights']:11,} | {stage['outputs']:7} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m latentrt.benchmarks.studies.step_time", description=__doc__.split("\n")[0]
    )
    parser.add_argument("bundle", type=Path, help="a bundle with fp32 graphs for ONNX Runtime")
    parser.add_argument("--side", type=int, help="height and width of the latents (default: the model's own)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each loop (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1, help="pictures in the batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads inside an operator; 0 is automatic")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.images < 1:
        parser.error("--rounds and --images take numbers from 1")
    bundle = Bundle.open(arguments.bundle)
    manifest = bundle.manifest
    if lacking := [part for part in ("unet", "unet_step") if FORM not in _graphs(bundle, part)]:
        parser.error(f"{arguments.bundle} has no {lacking[0]} in the form {FORM}; build it with latentrt build-engine")
    paths = {part: bundle.graph_path(part, FORM) for part in PARTS if FORM in _graphs(bundle, part)}
    side = arguments.side or manifest.defaults.height // manifest.latent.vae_scale_factor
    figures = measure(paths, side=side, rounds=arguments.rounds, images=arguments.images, threads=arguments.threads)
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    report = {"model": manifest.source.name, "machine": machine, "tools": manifest.tools, **figures}
    print(table(report))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _graphs(bundle: Bundle, part: str) -> Mapping[str, Graph]:
    components = bundle.manifest.components
    return components[part].graphs if part in components else {}


if __name__ == "__main__":
    sys.exit(main())
