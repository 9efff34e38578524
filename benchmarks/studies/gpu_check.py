"""Everything that plans do on a GPU, checked and timed in one run: for a machine that has one.

    python -m latentrt.benchmarks.studies.gpu_check BUNDLE [--engine tensorrt-rtx] [--steps N] [--rounds N] [--json
    FILE]

The bundle is one that was built with that engine. What plans compute is held against ONNX Runtime on the CPU; CUDA
graphs, the loop's state on the device, refitting, weight streaming, the runtime cache and threads are held against the
plain way to do the same. Every check passes, fails, or is skipped for a reason that is told. Times are of this machine;
the raw samples are in the report.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from latentrt.engines import Array, Engine, TensorSpec
from latentrt.engines.device import to_numpy
from latentrt.engines.errors import InvalidRequestError, LatentRTError
from latentrt.engines.store import EngineStore
from latentrt.engines.trt import (
    SDK_MODULES,
    BuildOptions,
    Profile,
    SessionOptions,
    ShapeRange,
    TensorRTEngine,
    build_plan,
    load_sdk,
)
from latentrt.engines.trt.cuda import cuda_devices
from latentrt.engines.trt.cudart import Cuda, load_cuda
from latentrt.runtime import Pipeline
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.components.plans import find_plan
from latentrt.runtime.families import family_of

PROMPTS = ("a red apple", "a rocket")
GATES = {"fp32": 60.0, "fp16": 35.0, "bf16": 25.0, "int8": 20.0, "fp8": 20.0}
"""Least PSNR in dB of a component's outputs against ONNX Runtime in fp32; sums in another order cost some of fp32's."""
PICTURES = {"fp32": 40.0, "fp16": 25.0, "bf16": 22.0, "int8": 20.0, "fp8": 20.0}
"""Least PSNR in dB of whole pictures (uint8)."""
_LEAK = 32 << 20


class Skipped(Exception):  # noqa: N818  # no error
    """A check does not apply here; the message says why."""


@dataclass
class Check:
    """Outcome of one check.

    Attributes:
        name: What was checked.
        status: ``"pass"``, ``"fail"`` or ``"skipped"``.
        detail: One line for people: figures, or the reason.
        samples: Raw figures by name; times are in seconds.
    """

    name: str
    status: str = "pass"
    detail: str = ""
    samples: dict[str, Any] = field(default_factory=dict)

    def require(self, condition: bool, otherwise: str) -> None:
        """Fail the check unless ``condition`` holds."""
        if not condition:
            raise AssertionError(otherwise)


class Recorder:
    """An engine whose first inputs and outputs are kept, or that brings all outputs to the host."""

    def __init__(self, engine: Engine) -> None:
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self.first: tuple[dict[str, Array], dict[str, Array]] | None = None
        self._engine = engine

    def open(self) -> Recorder:
        """It is open already."""
        return self

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Pass on."""
        self._engine.bind(feeds)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Pass on, with outputs on the host."""
        outputs = {name: to_numpy(values) for name, values in self._engine.run(feeds).items()}
        self.first = self.first or (dict(feeds), outputs)
        return outputs

    def close(self) -> None:
        """Pass on."""
        self._engine.close()


def psnr(reference: Array, received: Array, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, infinite for equal arrays; the peak is the reference's largest magnitude."""
    wanted, got = reference.astype(np.float64), received.astype(np.float64)
    error = float(np.mean(np.square(wanted - got)))
    peak = peak or float(np.abs(wanted).max())
    return (
        math.inf if error == 0 else 10 * math.log10(peak * peak / error) if peak and math.isfinite(error) else -math.inf
    )


class GpuCheck:
    """All checks of a bundle.

    Args:
        bundle: The bundle.
        engine: ``"tensorrt-rtx"`` or ``"tensorrt"``.
        steps: Steps of a picture.
        rounds: How often each thing is timed.
    """

    def __init__(self, bundle: Bundle, engine: str, *, steps: int, rounds: int) -> None:
        self.bundle, self.engine, self.rounds = bundle, engine, rounds
        _, self.schedule, self.step = family_of(bundle.manifest).stages()
        self.options: dict[str, Any] = {"steps": steps, "seed": 7}
        self.checks: list[Check] = []
        self.recorded: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}
        self.reference: dict[str, Array] = {}
        self.no_reference = ""
        self._cuda = Cuda(load_cuda())
        self._cuda.use()
        self._at_start, _ = self._cuda.memory()

    def run(self) -> list[Check]:
        """Do all checks; one that fails does not keep the others from being done."""
        self._make_reference()
        with Pipeline.load(self.bundle.path, self.engine) as pipe:
            for name, engine in pipe.engines.items():
                self._check(f"component {name}", functools.partial(self.component, name, engine))
            self._check("pictures", lambda check: self.pictures(check, pipe))
            self._check("CUDA graphs", lambda check: self.graphs(check, pipe))
            self._check("state on the device", lambda check: self.resident(check, pipe))
            self._check("threads", lambda check: self.threads(check, pipe))
            self._check("latency", lambda check: self.latency(check, pipe))
            self._check("memory", lambda check: self.memory(check, pipe))
        self._check("runtime cache", self.runtime_cache)
        self._check("refit", self.refit)
        self._check("weight streaming", self.weight_streaming)
        self._check("opening and closing", self.leaks)
        return self.checks

    def _check(self, name: str, work: Callable[[Check], None]) -> None:
        check = Check(name)
        self.checks.append(check)
        try:
            work(check)
        except Skipped as reason:
            check.status, check.detail = "skipped", str(reason)
        except (LatentRTError, AssertionError) as error:
            check.status, check.detail = "fail", " ".join(str(error).split())

    def _make_reference(self) -> None:
        """Pictures of ONNX Runtime, and what went into and came out of each component."""
        try:
            with Pipeline.load(self.bundle.path, "onnxruntime") as opened:
                engines = {name: Recorder(engine) for name, engine in opened.engines.items()}
                pipe = Pipeline(self.bundle, engines)
                for prompt in PROMPTS:
                    self.reference[prompt] = pipe(prompt, **self.options).images
                self.recorded = {name: each.first for name, each in engines.items() if each.first is not None}
        except LatentRTError as error:
            self.no_reference = f"ONNX Runtime cannot run this bundle: {error}"

    # --- with the pipeline

    def component(self, name: str, engine: Engine, check: Check) -> None:
        """A component's outputs against ONNX Runtime's, for what a real request gives it."""
        if self.no_reference:
            raise Skipped(self.no_reference)
        if name not in self.recorded:
            raise Skipped("a request with these steps does not run it")
        feeds, expected = self.recorded[name]
        cast = {n: array.astype(engine.inputs[n].dtype) for n, array in feeds.items()}
        worst, precision = math.inf, self.precision(name)
        for output, values in engine.run(cast).items():
            value = psnr(expected[output], to_numpy(values))
            check.samples[output] = value if math.isfinite(value) else str(value)
            worst = min(worst, value)
        check.detail = f"{worst:.1f} dB against ONNX Runtime ({precision}, at least {GATES[precision]:.0f})"
        check.require(worst >= GATES[precision], check.detail)

    def precision(self, component: str) -> str:
        """Precision of a component's plan."""
        return find_plan(self.bundle, self.engine, component).record.precision

    def pictures(self, check: Check, pipe: Pipeline) -> None:
        """Whole pictures against ONNX Runtime's."""
        if self.no_reference:
            raise Skipped(self.no_reference)
        values = {p: psnr(self.reference[p], pipe(p, **self.options).images, peak=255) for p in PROMPTS}
        check.samples = {prompt: value if math.isfinite(value) else str(value) for prompt, value in values.items()}
        gate, worst = PICTURES[self.precision(self.step)], min(values.values())
        check.detail = f"{worst:.1f} dB against ONNX Runtime (at least {gate:.0f})"
        check.require(worst >= gate, check.detail)

    def _steps(self, pipe: Pipeline) -> tuple[Array, list[float]]:
        """Latents of a request, and the seconds of its steps, the first two (warm-up and capture) left out."""
        options = {**self.options, "steps": max(4, self.rounds + 2)}
        result = pipe(PROMPTS[0], **options)
        return result.latents, result.timings.step[2:]

    def _with_step(self, pipe: Pipeline, step: Engine) -> Pipeline:
        return Pipeline(self.bundle, {**pipe.engines, self.step: step})

    def graphs(self, check: Check, pipe: Pipeline) -> None:
        """With and without CUDA graphs: the same bits, and what a step takes."""
        step = _plan_of(pipe, self.step)
        captured, replayed = step.graph_runs
        latents, with_graphs = self._steps(pipe)
        after = step.graph_runs
        check.require(after[1] > replayed, f"no graph was replayed (captured {after[0]}, before {captured})")
        with _copy(step, options=replace(step.options, cuda_graphs=False)) as plain:
            same, without = self._steps(self._with_step(pipe, plain))
        check.samples = {"step with graphs": with_graphs, "step without": without}
        check.detail = f"step {_ms(with_graphs)} with, {_ms(without)} without; {after[1] - replayed} replays"
        check.require(np.array_equal(latents, same), "latents with and without CUDA graphs differ")

    def resident(self, check: Check, pipe: Pipeline) -> None:
        """The state on the device against a copy through the host at every step."""
        latents, resident = self._steps(pipe)
        same, to_host = self._steps(self._with_step(pipe, Recorder(pipe.engines[self.step])))
        check.samples = {"step on the device": resident, "step through the host": to_host}
        check.detail = f"step {_ms(resident)} on the device, {_ms(to_host)} through the host"
        check.require(np.array_equal(latents, same), "latents differ between the two")

    def threads(self, check: Check, pipe: Pipeline) -> None:
        """Requests in several threads at once get the pictures that they get alone."""
        alone = {prompt: pipe(prompt, **self.options).latents for prompt in PROMPTS}
        found: dict[int, Any] = {}

        def draw(number: int) -> None:
            try:
                found[number] = pipe(PROMPTS[number % len(PROMPTS)], **self.options).latents
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
            check.require(same, "a request in a thread got another picture than alone")
        check.detail = f"{len(found)} requests at once, each as alone"

    def latency(self, check: Check, pipe: Pipeline) -> None:
        """What the device takes for each component, by CUDA events, and what requests take."""
        engines = {name: _plan_of(pipe, name) for name in pipe.engines}
        for engine in engines.values():
            engine.device_seconds = []
        try:
            begin = time.perf_counter()
            totals = []
            for seed in range(self.rounds):
                totals.append(pipe(f"{PROMPTS[0]} {seed}", **{**self.options, "seed": seed}).timings.total)
            check.samples = {name: engine.device_seconds for name, engine in engines.items()}
            check.samples |= {"request": totals, "all": time.perf_counter() - begin}
        finally:
            for engine in engines.values():
                engine.device_seconds = None
        told = {name: seconds for name, seconds in check.samples.items() if name != "all" and seconds}
        check.detail = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in told.items())

    def memory(self, check: Check, pipe: Pipeline) -> None:
        """Device memory that is taken after all that ran before (nothing is given back in between)."""
        free, total = self._cuda.memory()
        needs = {name: asdict(_plan_of(pipe, name).memory) for name in pipe.engines}
        arena = _plan_of(pipe, self.step).arena.nbytes
        check.samples = {"used": self._at_start - free, "total": total, "arena": arena, "needs": needs}
        check.detail = (
            f"{(self._at_start - free) / 2**20:,.0f} MiB used, of that {arena / 2**20:,.0f} MiB of activations"
        )

    # --- plans by themselves

    def _recorded_plan(self, component: str) -> tuple[Path, str, dict[str, Array]]:
        """File and target of a component's plan, and inputs for it."""
        if component not in self.recorded:
            raise Skipped(self.no_reference or f"no inputs of {component} were recorded")
        record = find_plan(self.bundle, self.engine, component).record
        return EngineStore(self.bundle.engines_directory).path(record), record.target, self.recorded[component][0]

    def runtime_cache(self, check: Check) -> None:
        """TensorRT-RTX's kernels are compiled at the first start, and read from their file at the second."""
        if self.engine != "tensorrt-rtx":
            raise Skipped("TensorRT compiles nothing at run time")
        plan, target, feeds = self._recorded_plan(self.step)
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(shutil.copy(plan, directory))
            outputs = []
            for name in ("cold", "warm"):
                begin = time.perf_counter()
                with TensorRTEngine(copy, engine=self.engine, target=target) as engine:
                    results = engine.run(_cast(engine, feeds))
                    check.samples[name] = time.perf_counter() - begin
                    outputs.append({output: values.numpy() for output, values in results.items()})  # type: ignore[attr-defined]
            files = [file.stat().st_size for file in Path(directory).glob("*.cache")]
        check.samples["bytes"] = files
        check.detail = f"start and first run {check.samples['cold']:.2f} s cold, {check.samples['warm']:.2f} s warm"
        check.require(len(files) == 1, "no runtime cache was written")
        check.require(_equal(*outputs), "outputs differ with kernels from the cache")

    def _build(self, options: BuildOptions, directory: str) -> tuple[Path, Path, dict[str, Array]]:
        """A plan of the denoiser's schedule stage (or the text encoder): graph, plan, and inputs for it."""
        name = next((name for name in (self.schedule, "text_encoder") if name in self.recorded), None)
        if name is None:
            raise Skipped(self.no_reference or "no inputs were recorded")
        forms = self.bundle.manifest.components[name].graphs
        form = next((form for form in forms if form.endswith("fp32")), next(iter(forms)))
        graph, plan = self.bundle.graph_path(name, form), Path(directory) / f"{name}.plan"
        feeds = {n: array.astype(_spec(forms[form].inputs, n).dtype) for n, array in self.recorded[name][0].items()}
        dynamic = [spec.name for spec in forms[form].inputs if any(isinstance(length, str) for length in spec.shape)]
        profile = Profile({n: ShapeRange(*[tuple(feeds[n].shape)] * 3) for n in dynamic})
        build_plan(load_sdk(self.engine), graph, plan, profile, options=options)
        return graph, plan, feeds

    def refit(self, check: Check) -> None:
        """A, B, A then B, and none: B is B whatever came before, and none is the plan as it was built."""
        with tempfile.TemporaryDirectory() as directory:
            graph, plan, feeds = self._build(BuildOptions(refittable=True), directory)
            with TensorRTEngine(plan, engine=self.engine, target=self._here()) as engine:
                first, second = (_changed(graph, engine.weights, which) for which in (0, -1))

                def outputs(*sets: Mapping[str, Array]) -> dict[str, Array]:
                    for weights in sets:
                        begin = time.perf_counter()
                        engine.refit(weights)
                        check.samples.setdefault("refit", []).append(time.perf_counter() - begin)
                    return {name: to_numpy(values) for name, values in engine.run(feeds).items()}

                base, a, b = outputs(), outputs(first), outputs({}, second)
                check.require(not _equal(base, a), "other weights changed nothing")
                check.require(not _equal(a, b), "two sets of weights gave the same")
                check.require(_equal(outputs(first, second), b), "A then B is not B")
                check.require(_equal(outputs({}), base), "without weights the plan is not as it was built")
                check.detail = f"A then B is B, none is the plan's own; {_ms(check.samples['refit'])} each"

    def weight_streaming(self, check: Check) -> None:
        """With all, half and none of the weights held on the device: the same bits."""
        with tempfile.TemporaryDirectory() as directory:
            _, plan, feeds = self._build(BuildOptions(weight_streaming=True), directory)
            results = []
            for budget in (None, plan.stat().st_size // 2, 0):
                options = SessionOptions(weight_streaming_budget=budget)
                engine = TensorRTEngine(plan, engine=self.engine, target=self._here(), options=options)
                try:
                    engine.open()
                except InvalidRequestError as error:
                    raise Skipped(f"the SDK streams none of this component's weights: {error}") from error
                with engine:
                    seconds: list[float] = []
                    engine.device_seconds = seconds
                    for _ in range(self.rounds + 1):
                        outputs = engine.run(feeds)
                    results.append({name: to_numpy(values) for name, values in outputs.items()})
                    check.samples["all" if budget is None else str(budget)] = seconds[1:]
            check.detail = ", ".join(f"budget {budget}: {_ms(seconds)}" for budget, seconds in check.samples.items())
            check.require(_equal(results[0], results[1]) and _equal(results[0], results[2]), "outputs differ")

    def leaks(self, check: Check) -> None:
        """Opening, drawing and closing again and again takes no memory with it."""
        free = []
        for _ in range(3):
            with Pipeline.load(self.bundle.path, self.engine) as pipe:
                pipe(PROMPTS[0], **self.options)
            free.append(self._cuda.memory()[0])
        check.samples = {"free": free}
        check.detail = f"{(free[0] - free[-1]) / 2**20:.1f} MiB fewer are free after two more rounds"
        check.require(free[0] - free[-1] <= _LEAK, check.detail)

    def _here(self) -> str:
        return cuda_devices()[0].architecture


def _plan_of(pipe: Pipeline, name: str) -> TensorRTEngine:
    engine = pipe.engines[name]
    if not isinstance(engine, TensorRTEngine):
        raise Skipped(f"{name} is not run by a plan")
    return engine


def _copy(engine: TensorRTEngine, options: SessionOptions) -> TensorRTEngine:
    """The same plan once more, with other options."""
    return TensorRTEngine(engine.plan, engine=engine.engine, target=engine.target, options=options)


def _spec(specs: Sequence[TensorSpec], name: str) -> TensorSpec:
    return next(spec for spec in specs if spec.name == name)


def _cast(engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array.astype(engine.inputs[name].dtype) for name, array in feeds.items()}


def _equal(left: Mapping[str, Array], right: Mapping[str, Array]) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in left)


def _ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * median(seconds):.2f} ms"


def _changed(graph: Path, weights: Mapping[str, tuple[str, int]], which: int) -> dict[str, Array]:
    """One matrix of a graph, a little larger, for a refit.

    Args:
        graph: The ONNX file.
        weights: What can be refitted.
        which: Number of the matrix among them.
    """
    try:
        import onnx
    except ImportError as error:
        raise Skipped('the weights are read with onnx; install it with: pip install "latentrt[export]"') from error
    model = onnx.load(graph)
    known = [each for each in model.graph.initializer if each.name in weights and len(each.dims) >= 2]
    if len(known) < 2:
        raise Skipped("the plan has fewer than two matrices that can be refitted")
    values = onnx.numpy_helper.to_array(known[which], base_dir=str(graph.parent))
    return {known[which].name: (values * 1.5 + 0.01).astype(values.dtype)}


def describe_machine(engine: str) -> dict[str, Any]:
    """What the figures were taken on."""
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
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    width = max(len(check["name"]) for check in report["checks"])
    lines = [f"{report['model']} on {machine['gpu']} ({machine['architecture']}), {machine['sdk']}", ""]
    lines += [f"{check['status']:7}  {check['name']:{width}}  {check['detail']}" for check in report["checks"]]
    counts = {status: sum(c["status"] == status for c in report["checks"]) for status in ("pass", "fail", "skipped")}
    return "\n".join([*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items())])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit status, 1 if one failed or none could be done."""
    parser = argparse.ArgumentParser(
        prog="python -m latentrt.benchmarks.studies.gpu_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("bundle", type=Path, help="a bundle that was built with --engine tensorrt-rtx or tensorrt")
    parser.add_argument("--engine", choices=sorted(SDK_MODULES), default="tensorrt-rtx", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="steps of a picture (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="how often each thing is timed (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the report, with all samples, to this file too")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.rounds < 1:
        parser.error("--steps and --rounds take numbers from 1")
    if not cuda_devices():
        print("gpu_check needs an NVIDIA GPU and its driver, and no CUDA device was found here", file=sys.stderr)
        return 1
    begin = time.perf_counter()
    try:
        bundle = Bundle.open(arguments.bundle)
        machine = describe_machine(arguments.engine)
        checks = GpuCheck(bundle, arguments.engine, steps=arguments.steps, rounds=arguments.rounds).run()
    except LatentRTError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    report = {
        "model": bundle.manifest.source.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "tools": bundle.manifest.tools,
        "arguments": {"engine": arguments.engine, "steps": arguments.steps, "rounds": arguments.rounds},
        "seconds": time.perf_counter() - begin,
        "checks": [asdict(check) for check in checks],
    }
    print(table(report))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(check.status == "fail" for check in checks))


if __name__ == "__main__":
    sys.exit(main())
