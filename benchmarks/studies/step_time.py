"""Time a step of the denoising loop, fused and plain in turn in one run, and the host's share of it.

    python -m latentrt.benchmarks.studies.step_time BUNDLE [--rounds N] [--json FILE]

Both loops take guided steps of the same run with ONNX Runtime, in turn, so that other load on the machine affects both.
The host's share is the time of a step outside the engine: scaling, guidance and update in numpy for the plain loop,
inputs for the fused one. :mod:`latentrt.benchmarks.checkpoints.write` writes a model of Stable Diffusion 1.5's size to
build the bundle from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

from ..machine import system_facts
from ..program import at_least, make_parser, write_json
from ..turns import take_turns
from .wrapped import Timed

PARTS = ("unet", "unet_prompt", "unet_schedule", "unet_step")
FORM = "opset20-fp32"
_TOKENS = 77  # of a prompt of one chunk
_SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear"}


def measure(
    paths: Mapping[str, Path], *, side: int, rounds: int, images: int, threads: int, warm_up: int = 1
) -> dict[str, Any]:
    """Time both loops.

    Args:
        paths: Graphs of :data:`PARTS`; prompt and schedule may be missing.
        side: Height and width of the latents.
        rounds: Steps of each loop that count.
        images: Images in the batch.
        threads: Threads inside an operator; 0 is automatic.
        warm_up: Steps of each loop before those.

    Returns:
        ``samples``: by loop, seconds of every step and of its share outside the engine. ``plain_over_fused``: the
        median ratio, pair by pair. ``relative_difference``: of the latents at the end (L2). ``stages``: by graph,
        numbers of nodes, weights and outputs.
    """
    with ExitStack() as stack:
        options = OnnxRuntimeOptions(threads=threads)
        engines = {
            name: Timed(stack.enter_context(OnnxRuntimeEngine(path, options, label=name)))
            for name, path in paths.items()
        }
        fused = FusedLoop(engines["unet_step"], engines.get("unet_prompt"), engines.get("unet_schedule"))
        loops: dict[str, tuple[Loop, Timed]] = {
            "plain": (PlainLoop(engines["unet"]), engines["unet"]),
            "fused": (fused, engines["unet_step"]),
        }
        inputs = engines["unet"].inputs
        length, width = inputs["encoder_hidden_states"].shape[1:]
        tokens = length if isinstance(length, int) else _TOKENS
        shape = (images, int(inputs["sample"].shape[1]), side, side)
        generator = np.random.default_rng(0)
        texts = [generator.standard_normal((1, tokens, int(width)), np.float32) for _ in range(2)]
        runs = {
            name: begin_run(loop, _SCHEDULER, texts, shape, warm_up + rounds, 7.5) for name, (loop, _) in loops.items()
        }
        inside: dict[str, list[float]] = {name: [] for name in loops}
        work = {name: _step(*loops[name], runs[name], inside[name]) for name in loops}
        seconds = take_turns(work, rounds, warm_up=warm_up)
        reference = runs["plain"].latents
        return {
            "latents": list(shape),
            "rounds": rounds,
            "samples": {
                name: {
                    "step": seconds[name],
                    "host": [step - engine for step, engine in zip(seconds[name], inside[name][warm_up:], strict=True)],
                }
                for name in loops
            },
            "plain_over_fused": median(a / b for a, b in zip(seconds["plain"], seconds["fused"], strict=True)),
            "relative_difference": float(np.linalg.norm(runs["fused"].latents - reference) / np.linalg.norm(reference)),
            "stages": {
                name: asdict(summarize(path)) | {"outputs": len(engines[name].outputs)} for name, path in paths.items()
            },
        }


def _step(loop: Loop, engine: Timed, run: Run, inside: list[float]) -> Callable[[], None]:
    """One step of a run; appends the seconds that it spent in the engine to ``inside``."""

    def step() -> None:
        engine.seconds = 0.0
        loop.advance([run])
        inside.append(engine.seconds)

    return step


def begin_run(
    loop: Loop,
    scheduler: Mapping[str, Any],
    texts: Sequence[NDArray[np.float32]],
    shape: tuple[int, int, int, int],
    steps: int,
    guidance: float,
) -> Run:
    """Begin a run of Euler's method whose conditioning is given as states of a text encoder.

    Args:
        loop: The loop that will advance it.
        scheduler: A scheduler's configuration.
        texts: States of the unconditional and the conditional prompt, fp32 ``[1, tokens, width]`` each.
        shape: Shape of the latents, ``[images, channels, h, w]``.
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
        f"A step of the plain loop takes {report['plain_over_fused']:.3f} times as long as one of the fused loop "
        f"(median of {report['rounds']} pairs); the relative difference of the latents at the end is "
        f"{report['relative_difference']:.1e}.",
        "",
        "| graph         | nodes |     weights | outputs |",
        "|---------------|------:|------------:|--------:|",
    ]
    for name, stage in report["stages"].items():
        lines.append(f"| {name:13} | {stage['nodes']:5,} | {stage['weights']:11,} | {stage['outputs']:7} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = make_parser("studies.step_time", __doc__)
    parser.add_argument("bundle", type=Path, help="a bundle with fp32 graphs for ONNX Runtime")
    parser.add_argument("--side", type=at_least(1), help="height and width of the latents (default: the model's own)")
    parser.add_argument("--rounds", type=at_least(1), default=7, help="steps of each loop (default: %(default)s)")
    parser.add_argument("--images", type=at_least(1), default=1, help="images in the batch (default: %(default)s)")
    parser.add_argument("--threads", type=at_least(0), default=0, help="threads inside an operator; 0 is automatic")
    arguments = parser.parse_args(argv)
    bundle = Bundle.open(arguments.bundle)
    manifest = bundle.manifest
    if lacking := [part for part in ("unet", "unet_step") if FORM not in _graphs(bundle, part)]:
        parser.error(f"{arguments.bundle} has no {lacking[0]} in the form {FORM}; build it with latentrt build-engine")
    paths = {part: bundle.graph_path(part, FORM) for part in PARTS if FORM in _graphs(bundle, part)}
    side = arguments.side or manifest.defaults.height // manifest.latent.vae_scale_factor
    figures = measure(paths, side=side, rounds=arguments.rounds, images=arguments.images, threads=arguments.threads)
    report = {"model": manifest.source.name, "machine": system_facts(), "tools": manifest.tools, **figures}
    print(table(report))
    write_json(arguments.json, report)
    return 0


def _graphs(bundle: Bundle, part: str) -> Mapping[str, Graph]:
    components = bundle.manifest.components
    return components[part].graphs if part in components else {}


if __name__ == "__main__":
    sys.exit(main())
