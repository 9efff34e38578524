"""The bundle that is checked, and the reference that ONNX Runtime on the CPU computes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentrt.engines import Array
from latentrt.engines.errors import LatentRTError
from latentrt.engines.store import EngineStore
from latentrt.engines.trt.cudart import Cuda, load_cuda
from latentrt.runtime import Pipeline
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.components.plans import find_plan
from latentrt.runtime.families import family_of

from ..wrapped import Recorder
from .outcome import Skipped

PROMPTS = ("a red apple", "a rocket")
"""Prompts of the requests that are compared."""


class Subject:
    """A bundle with plans, and the results of ONNX Runtime in fp32 that plans are compared with.

    Args:
        bundle: The bundle.
        engine: ``"tensorrt-rtx"`` or ``"tensorrt"``.
        steps: Steps of an image.
        rounds: Number of samples of each time.

    Attributes:
        options: Options of every request.
        schedule: Name of the denoiser's schedule stage.
        step: Name of the denoiser's step.
        cuda: The CUDA runtime, with a device in use.
        free_at_start: Bytes of device memory that were free before anything ran.
        reference: Images of ONNX Runtime by prompt, uint8 ``[1, height, width, 3]``.
        recorded: Inputs and outputs of each component in the first request, by the component's name.
        no_reference: Why there is no reference; empty where there is one.
    """

    def __init__(self, bundle: Bundle, engine: str, *, steps: int, rounds: int) -> None:
        self.bundle, self.engine, self.rounds = bundle, engine, rounds
        self.options: dict[str, Any] = {"steps": steps, "seed": 7}
        _, self.schedule, self.step = family_of(bundle.manifest).stages()
        self.cuda = Cuda(load_cuda())
        self.cuda.use()
        self.free_at_start, _ = self.cuda.memory()
        self.reference: dict[str, Array] = {}
        self.recorded: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}
        self.no_reference = ""
        self._make_reference()

    def load(self) -> Pipeline:
        """Open a pipeline that runs the bundle's plans."""
        return Pipeline.load(self.bundle.path, self.engine)

    def precision(self, component: str) -> str:
        """The precision of a component's plan."""
        return find_plan(self.bundle, self.engine, component).record.precision

    def need_reference(self) -> None:
        """Skip a check that compares with ONNX Runtime where that cannot run the bundle."""
        if self.no_reference:
            raise Skipped(self.no_reference)

    def recorded_inputs(self, component: str) -> dict[str, Array]:
        """Inputs of a component in a real request; skips the check where none were recorded."""
        if component not in self.recorded:
            raise Skipped(self.no_reference or f"no inputs of {component} were recorded")
        return self.recorded[component][0]

    def plan_file(self, component: str) -> tuple[Path, str]:
        """The file of a component's plan, and the target that it was built for."""
        record = find_plan(self.bundle, self.engine, component).record
        return EngineStore(self.bundle.engines_directory).path(record), record.target

    def _make_reference(self) -> None:
        """Draw with ONNX Runtime, and keep the images and each component's inputs and outputs."""
        try:
            with Pipeline.load(self.bundle.path, "onnxruntime") as opened:
                engines = {name: Recorder(engine) for name, engine in opened.engines.items()}
                pipe = Pipeline(self.bundle, engines)
                for prompt in PROMPTS:
                    self.reference[prompt] = pipe(prompt, **self.options).images
                self.recorded = {name: each.first for name, each in engines.items() if each.first is not None}
        except LatentRTError as error:
            self.no_reference = f"ONNX Runtime cannot run this bundle: {error}"
