"""LatentRT as a contender: a program that speaks the same protocol as those of the peers.

    python -m latentrt.benchmarks.contest.worker

The program imports nothing of the runtime before the request ``open``, so that the time of importing is that of a user.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..peers import wire

if TYPE_CHECKING:
    from latentrt.runtime import Pipeline


class Worker:
    """Draws with a bundle.

    Options of a job: ``engine``, ``precision``, ``loop`` and ``engine_cache`` as :meth:`Pipeline.load` takes them;
    ``fixed_size``, whether to load for the job's size only; ``slow``, seconds to wait in every step, for tests of the
    harness. Every request encodes its prompts again, because peers keep none.
    """

    def __init__(self) -> None:
        self._pipelines: dict[int, Pipeline] = {}
        self._free_before = 0

    def open(self, job: dict[str, Any]) -> dict[str, Any]:
        """Import the runtime and load the bundle."""
        begin = time.perf_counter()
        import latentrt.runtime  # noqa: F401 - for the time that it takes

        imported = time.perf_counter()
        self._free_before = _free_device_memory()
        loading = time.perf_counter()
        pipeline = self._pipeline(job, job["images"])
        loaded = time.perf_counter()
        options = job["options"]
        compiles = options["engine"] == "openvino"
        kept = [engine.opened.reused for engine in pipeline.engines.values() if hasattr(engine, "opened")]
        return {
            "import_seconds": imported - begin,
            "load_seconds": loaded - loading,
            # OpenVINO compiles, or reads a compiled model; ONNX Runtime prepares a graph while it loads it.
            "compile_seconds": loaded - loading if compiles else None,
            "prepare_seconds": None,
            "versions": _versions(options["engine"]),
            "device": job["device"],
            "disk_bytes": _disk_bytes(pipeline, options),
            "notes": [f"{pipeline.loop.name} loop"],
            "compiled_before": bool(kept) and all(kept),
        }

    def draw(self, request: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        """Draw the job's images."""
        images = request["images"] or job["images"]
        pipeline = self._pipeline(job, images)
        wait = job["options"].get("slow", 0.0)
        begin = time.perf_counter()
        stream = pipeline.stream(
            job["prompt"],
            negative_prompt=job["negative_prompt"],
            steps=request["steps"] or job["steps"],
            sampler=job["sampler"],
            guidance=job["guidance"],
            seed=job["seed"],
            width=job["width"],
            height=job["height"],
            images=images,
        )
        while True:
            try:
                next(stream)
                time.sleep(wait)
            except StopIteration as stop:
                result = stop.value
                break
        total = time.perf_counter() - begin
        if request["picture"] is not None:
            import numpy as np

            np.save(request["picture"], result.images)
        timings = asdict(result.timings)
        del timings["vae_encoder"], timings["safety_checker"]  # a job has no starting image and no safety checker
        steps = [seconds + wait for seconds in timings.pop("step")]
        used = self._free_before - _free_device_memory()
        return {**timings, "steps": steps, "total": total, "device_peak_bytes": used or None}

    def close(self) -> None:
        """Close the pipelines."""
        for pipeline in self._pipelines.values():
            pipeline.close()
        self._pipelines.clear()

    def _pipeline(self, job: dict[str, Any], images: int) -> Pipeline:
        """The pipeline for a number of images; without a fixed size one pipeline serves all."""
        from latentrt.engines.errors import BundleError, EngineUnavailableError, InvalidRequestError
        from latentrt.runtime import Pipeline

        options = job["options"]
        key = images if options["fixed_size"] else 0
        if key not in self._pipelines:
            try:
                self._pipelines[key] = Pipeline.load(
                    job["bundle"],
                    options["engine"],
                    precision=options["precision"],
                    threads=job["threads"],
                    loop=options["loop"],
                    engine_cache=options["engine_cache"],
                    fixed_size=(job["width"], job["height"], images) if options["fixed_size"] else None,
                    prompt_cache=0,
                )
            except (EngineUnavailableError, InvalidRequestError, BundleError) as error:
                raise wire.UnsupportedError(str(error)) from error
        return self._pipelines[key]


def _versions(engine: str) -> dict[str, str]:
    from latentrt.runtime.components.engine_probe import probe

    return {**wire.versions("latentrt", "numpy"), engine: probe(engine).version}


def _disk_bytes(pipeline: Pipeline, options: dict[str, Any]) -> int:
    """Size of all files that the pipeline's engines read, each counted once."""
    from latentrt.engines.kinds import KINDS
    from latentrt.engines.store import EngineStore
    from latentrt.runtime.components.engine_choice import choose_graph
    from latentrt.runtime.components.plans import find_plan

    bundle, engine, precision = pipeline.bundle, options["engine"], options["precision"]
    files: dict[str, int] = {}
    for component in pipeline.engines:
        if KINDS[engine].needs_plans:
            plan = find_plan(bundle, engine, component, precision)
            files[plan.record.key] = EngineStore(bundle.engines_directory).path(plan.record).stat().st_size
            continue
        stored = KINDS[engine].graph_precision(precision)
        _, graph = choose_graph(bundle.manifest.components[component], engine, stored)
        for name in (graph.file, *graph.external):
            files[name] = bundle.manifest.files[name].size
    return sum(files.values())


def _free_device_memory() -> int:
    """Bytes free on the first CUDA device; 0 without one."""
    from latentrt.engines.trt.cuda import cuda_devices

    if not cuda_devices():
        return 0
    from latentrt.engines.trt.cudart import Cuda, load_cuda

    return Cuda(load_cuda()).memory()[0]


if __name__ == "__main__":
    sys.exit(wire.serve(Worker))
