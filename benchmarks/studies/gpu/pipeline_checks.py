"""Checks of a pipeline that runs plans: its outputs, CUDA graphs, resident state, threads, times and memory."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from latentrt.engines import Array, Engine
from latentrt.engines.device import to_numpy
from latentrt.engines.errors import LatentRTError
from latentrt.engines.trt import TensorRTEngine
from latentrt.runtime import Pipeline

from ..wrapped import Recorder
from .outcome import Check, Skipped, as_json, milliseconds, psnr
from .subject import PROMPTS, Subject

OUTPUT_GATES = {"fp32": 60.0, "fp16": 35.0, "bf16": 25.0, "int8": 20.0, "fp8": 20.0}
"""Least PSNR in dB of a component's outputs against ONNX Runtime in fp32; sums in another order cost some of fp32's."""

IMAGE_GATES = {"fp32": 40.0, "fp16": 25.0, "bf16": 22.0, "int8": 20.0, "fp8": 20.0}
"""Least PSNR in dB of whole images (uint8)."""


def component(subject: Subject, name: str, engine: Engine, check: Check) -> None:
    """Compare a component's outputs with ONNX Runtime's, for the inputs of a real request."""
    subject.need_reference()
    if name not in subject.recorded:
        raise Skipped("a request with these steps does not run it")
    feeds, expected = subject.recorded[name]
    cast = {n: array.astype(engine.inputs[n].dtype) for n, array in feeds.items()}
    worst, precision = math.inf, subject.precision(name)
    for output, values in engine.run(cast).items():
        value = psnr(expected[output], to_numpy(values))
        check.samples[output] = as_json(value)
        worst = min(worst, value)
    gate = OUTPUT_GATES[precision]
    check.detail = f"{worst:.1f} dB against ONNX Runtime ({precision}, at least {gate:.0f})"
    check.require(worst >= gate, check.detail)


def images(subject: Subject, pipe: Pipeline, check: Check) -> None:
    """Compare whole images with ONNX Runtime's."""
    subject.need_reference()
    values = {p: psnr(subject.reference[p], pipe(p, **subject.options).images, peak=255) for p in PROMPTS}
    check.samples = {prompt: as_json(value) for prompt, value in values.items()}
    gate, worst = IMAGE_GATES[subject.precision(subject.step)], min(values.values())
    check.detail = f"{worst:.1f} dB against ONNX Runtime (at least {gate:.0f})"
    check.require(worst >= gate, check.detail)


def cuda_graphs(subject: Subject, pipe: Pipeline, check: Check) -> None:
    """Compare steps with and without CUDA graphs: latents must be equal to the last bit."""
    step = _plan_of(pipe, subject.step)
    captured, replayed = step.graph_runs
    latents, with_graphs = _steps(subject, pipe)
    after = step.graph_runs
    check.require(after[1] > replayed, f"no graph was replayed (captured {after[0]}, before {captured})")
    options = replace(step.options, cuda_graphs=False)
    with TensorRTEngine(step.plan, engine=step.engine, target=step.target, options=options) as plain:
        same, without = _steps(subject, _with_step(subject, pipe, plain))
    check.samples = {"step with graphs": with_graphs, "step without": without}
    replays = after[1] - replayed
    check.detail = f"step {milliseconds(with_graphs)} with, {milliseconds(without)} without; {replays} replays"
    check.require(np.array_equal(latents, same), "latents with and without CUDA graphs differ")


def resident_state(subject: Subject, pipe: Pipeline, check: Check) -> None:
    """Compare steps that keep the loop's state on the device with steps that copy it through the host."""
    latents, resident = _steps(subject, pipe)
    same, to_host = _steps(subject, _with_step(subject, pipe, Recorder(pipe.engines[subject.step])))
    check.samples = {"step on the device": resident, "step through the host": to_host}
    check.detail = f"step {milliseconds(resident)} on the device, {milliseconds(to_host)} through the host"
    check.require(np.array_equal(latents, same), "latents differ between the two")


def threads(subject: Subject, pipe: Pipeline, check: Check) -> None:
    """Compare requests of several threads at once with the same requests alone."""
    alone = {prompt: pipe(prompt, **subject.options).latents for prompt in PROMPTS}
    found: dict[int, Any] = {}

    def draw(number: int) -> None:
        try:
            found[number] = pipe(PROMPTS[number % len(PROMPTS)], **subject.options).latents
        except LatentRTError as error:
            found[number] = error

    workers = [threading.Thread(target=draw, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, latents in found.items():
        check.require(not isinstance(latents, LatentRTError), f"a request in a thread failed: {latents}")
        same = np.array_equal(latents, alone[PROMPTS[number % len(PROMPTS)]])
        check.require(same, "a request in a thread got another image than alone")
    check.detail = f"{len(found)} requests at once, each as alone"


def latency(subject: Subject, pipe: Pipeline, check: Check) -> None:
    """Time each component on the device by CUDA events, and whole requests."""
    engines = {name: _plan_of(pipe, name) for name in pipe.engines}
    for engine in engines.values():
        engine.device_seconds = []
    try:
        begin = time.perf_counter()
        totals = []
        for seed in range(subject.rounds):
            totals.append(pipe(f"{PROMPTS[0]} {seed}", **{**subject.options, "seed": seed}).timings.total)
        check.samples = {name: engine.device_seconds for name, engine in engines.items()}
        check.samples |= {"request": totals, "all": time.perf_counter() - begin}
    finally:
        for engine in engines.values():
            engine.device_seconds = None
    shown = {name: seconds for name, seconds in check.samples.items() if name != "all" and seconds}
    check.detail = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in shown.items())


def memory(subject: Subject, pipe: Pipeline, check: Check) -> None:
    """Measure the device memory in use after all earlier checks, none of which frees any."""
    free, total = subject.cuda.memory()
    needs = {name: asdict(_plan_of(pipe, name).memory) for name in pipe.engines}
    arena, used = _plan_of(pipe, subject.step).arena.nbytes, subject.free_at_start - free
    check.samples = {"used": used, "total": total, "arena": arena, "needs": needs}
    check.detail = f"{used / 2**20:,.0f} MiB used, of that {arena / 2**20:,.0f} MiB of activations"


def _steps(subject: Subject, pipe: Pipeline) -> tuple[Array, list[float]]:
    """Latents of a request, and seconds of its steps but the first two, which warm up and capture a graph."""
    options = {**subject.options, "steps": max(4, subject.rounds + 2)}
    result = pipe(PROMPTS[0], **options)
    return result.latents, result.timings.step[2:]


def _with_step(subject: Subject, pipe: Pipeline, step: Engine) -> Pipeline:
    """A pipeline with another engine for the step."""
    return Pipeline(subject.bundle, {**pipe.engines, subject.step: step})


def _plan_of(pipe: Pipeline, name: str) -> TensorRTEngine:
    engine = pipe.engines[name]
    if not isinstance(engine, TensorRTEngine):
        raise Skipped(f"{name} is not run by a plan")
    return engine
