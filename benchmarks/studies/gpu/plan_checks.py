"""Checks of plans without a pipeline: runtime cache, refitting, weight streaming, and opening again and again."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from latentrt.engines import Array
from latentrt.engines.device import to_numpy
from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.trt import (
    BuildOptions,
    Profile,
    SessionOptions,
    ShapeRange,
    TensorRTEngine,
    build_plan,
    load_sdk,
)
from latentrt.engines.trt.cuda import cuda_devices

from .outcome import Check, Skipped, equal, milliseconds
from .subject import PROMPTS, Subject

_LEAK = 32 << 20  # bytes of device memory that may be missing after a few rounds


def runtime_cache(subject: Subject, check: Check) -> None:
    """TensorRT-RTX compiles its kernels at the first start, and reads them from its file at the second."""
    if subject.engine != "tensorrt-rtx":
        raise Skipped("TensorRT compiles nothing at run time")
    feeds = subject.recorded_inputs(subject.step)
    plan, target = subject.plan_file(subject.step)
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(shutil.copy(plan, directory))
        outputs = []
        for name in ("cold", "warm"):
            begin = time.perf_counter()
            with TensorRTEngine(copy, engine=subject.engine, target=target) as engine:
                cast = {n: array.astype(engine.inputs[n].dtype) for n, array in feeds.items()}
                results = engine.run(cast)
                check.samples[name] = time.perf_counter() - begin
                outputs.append({output: to_numpy(values) for output, values in results.items()})
        files = [file.stat().st_size for file in Path(directory).glob("*.cache")]
    check.samples["bytes"] = files
    check.detail = f"start and first run {check.samples['cold']:.2f} s cold, {check.samples['warm']:.2f} s warm"
    check.require(len(files) == 1, "no runtime cache was written")
    check.require(equal(*outputs), "outputs differ with kernels from the cache")


def refit(subject: Subject, check: Check) -> None:
    """Weights A, B, A then B, and none: B is B whatever came before, and none restores the plan's own weights."""
    with tempfile.TemporaryDirectory() as directory:
        graph, plan, feeds = _build(subject, BuildOptions(refittable=True), directory)
        with TensorRTEngine(plan, engine=subject.engine, target=_target()) as engine:
            first, second = (_changed(graph, engine.weights, which) for which in (0, -1))

            def outputs(*sets: Mapping[str, Array]) -> dict[str, Array]:
                for weights in sets:
                    begin = time.perf_counter()
                    engine.refit(weights)
                    check.samples.setdefault("refit", []).append(time.perf_counter() - begin)
                return {name: to_numpy(values) for name, values in engine.run(feeds).items()}

            base, a, b = outputs(), outputs(first), outputs({}, second)
            check.require(not equal(base, a), "other weights changed nothing")
            check.require(not equal(a, b), "two sets of weights gave the same")
            check.require(equal(outputs(first, second), b), "A then B is not B")
            check.require(equal(outputs({}), base), "without weights the plan is not as it was built")
            check.detail = f"A then B is B, none is the plan's own; {milliseconds(check.samples['refit'])} each"


def weight_streaming(subject: Subject, check: Check) -> None:
    """Outputs are equal to the last bit with all, half and none of the weights kept on the device."""
    with tempfile.TemporaryDirectory() as directory:
        _, plan, feeds = _build(subject, BuildOptions(weight_streaming=True), directory)
        results = []
        for budget in (None, plan.stat().st_size // 2, 0):
            options = SessionOptions(weight_streaming_budget=budget)
            engine = TensorRTEngine(plan, engine=subject.engine, target=_target(), options=options)
            try:
                engine.open()
            except InvalidRequestError as error:
                raise Skipped(f"the SDK streams none of this component's weights: {error}") from error
            with engine:
                seconds: list[float] = []
                engine.device_seconds = seconds
                for _ in range(subject.rounds + 1):
                    outputs = engine.run(feeds)
                results.append({name: to_numpy(values) for name, values in outputs.items()})
                check.samples["all" if budget is None else str(budget)] = seconds[1:]
        check.detail = ", ".join(f"budget {budget}: {milliseconds(taken)}" for budget, taken in check.samples.items())
        check.require(equal(results[0], results[1]) and equal(results[0], results[2]), "outputs differ")


def leaks(subject: Subject, check: Check) -> None:
    """Opening, drawing and closing again and again loses no device memory."""
    free = []
    for _ in range(3):
        with subject.load() as pipe:
            pipe(PROMPTS[0], **subject.options)
        free.append(subject.cuda.memory()[0])
    check.samples = {"free": free}
    check.detail = f"{(free[0] - free[-1]) / 2**20:.1f} MiB fewer are free after two more rounds"
    check.require(free[0] - free[-1] <= _LEAK, check.detail)


def _build(subject: Subject, options: BuildOptions, directory: str) -> tuple[Path, Path, dict[str, Array]]:
    """Build a plan of the denoiser's schedule stage, or of the text encoder; returns graph, plan and inputs for it."""
    name = next((name for name in (subject.schedule, "text_encoder") if name in subject.recorded), None)
    if name is None:
        raise Skipped(subject.no_reference or "no inputs were recorded")
    forms = subject.bundle.manifest.components[name].graphs
    form = next((form for form in forms if form.endswith("fp32")), next(iter(forms)))
    inputs = {spec.name: spec for spec in forms[form].inputs}
    graph, plan = subject.bundle.graph_path(name, form), Path(directory) / f"{name}.plan"
    feeds = {n: array.astype(inputs[n].dtype) for n, array in subject.recorded[name][0].items()}
    dynamic = [n for n, spec in inputs.items() if any(isinstance(length, str) for length in spec.shape)]
    profile = Profile({n: ShapeRange(*[tuple(feeds[n].shape)] * 3) for n in dynamic})
    build_plan(load_sdk(subject.engine), graph, plan, profile, options=options)
    return graph, plan, feeds


def _target() -> str:
    """The target of plans that are built and run here."""
    return cuda_devices()[0].architecture


def _changed(graph: Path, weights: Mapping[str, tuple[str, int]], which: int) -> dict[str, Array]:
    """One matrix of a graph, a little larger, for a refit.

    Args:
        graph: The ONNX file.
        weights: The weights that can be refitted.
        which: Index of the matrix among them.
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
