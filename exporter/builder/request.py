"""What a build is asked for, checked before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.trt import BuildOptions, Range
from latentrt.runtime.bundle import manifest as m
from latentrt.runtime.lora.reading import LoraFile
from latentrt.runtime.request.options import MAX_SIDE
from latentrt.runtime.samplers import SAMPLERS, default_sampler

from ..adapters.controlnet import ControlNetFile
from ..adapters.ip_adapter import IpAdapterFiles
from ..graphs.targets import TARGETS, form_for
from ..precision.calibration import Calibration
from ..precision.reduce import Quantization
from ..source.opening import Reading
from ..source.source import Source

_LONGEST = {"batch": 4096, "height": MAX_SIDE, "width": MAX_SIDE}


_MOST_STEPS, _MOST_GUIDANCE = 10_000, 1000  # what a manifest takes


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        source: A diffusers directory, a single-file checkpoint, or the name of a model on a hub.
        output: The bundle's directory; a bundle that is there already is replaced, or extended if it comes from the
            same source.
        engines: Engines to build for, keys of :data:`latentrt.exporter.graphs.targets.TARGETS`.
        precision: One of :data:`latentrt.runtime.bundle.manifest.PRECISIONS` that all of the engines have.
        ranges: Lengths that compiled engines are built for: ``batch`` (pictures), ``height`` and ``width`` (pixels).
            What is left out is one picture of the model's own size.
        verify: Compare every exported component with torch, and pictures of reduced precision with those of fp32.
        options: Settings of TensorRT builds.
        steps: Sampler steps that the bundle uses by default; ``None`` keeps those of a bundle that is extended, or
            takes 20.
        guidance: Guidance scale that the bundle uses by default; ``None`` likewise, or that of the family.
        sampler: Sampler that the bundle uses by default; ``None`` likewise, or the one of the source's scheduler.
        calibration: What is drawn for a reduced precision, to learn ranges and to compare pictures. ``None`` draws
            nothing: values of fp16 are kept in range on example inputs alone. It goes with fp16 and bf16 that are not
            compared, for models that cannot be run here.
        quantization: How the layers are chosen that are computed in 8 bits.
        accept_quality: Keep a reduced precision whose pictures are below the gate.
        loras: LoRAs to fuse into the weights, one after the other.
        tiny_vae: A directory of diffusers' AutoencoderTiny, whose decoder the bundle gets beside the model's own.
        controlnets: Directories of diffusers' ControlNetModel, and what requests call them.
        ip_adapter: An IP-Adapter and its image encoder.
        safety_checker: A directory of diffusers' StableDiffusionSafetyChecker, or of a model that has one, for requests
            that want their pictures checked.
        reading: What the source does not say itself.
    """

    source: Path
    output: Path
    engines: Sequence[str] = ("onnxruntime",)
    precision: str = "fp32"
    ranges: Mapping[str, Range] = field(default_factory=dict)
    verify: bool = True
    options: BuildOptions = field(default_factory=BuildOptions)
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    calibration: Calibration | None = field(default_factory=Calibration)
    quantization: Quantization = field(default_factory=Quantization)
    accept_quality: bool = False
    loras: Sequence[LoraFile] = ()
    tiny_vae: Path | None = None
    controlnets: Sequence[ControlNetFile] = ()
    ip_adapter: IpAdapterFiles | None = None
    safety_checker: Path | None = None
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        if not self.engines:
            raise InvalidRequestError(f"no engine is named; known engines: {', '.join(TARGETS)}")
        for engine in self.engines:
            form_for(engine, self.precision)
        for name, lengths in self.ranges.items():
            if name not in _LONGEST:
                raise InvalidRequestError(f"unknown profile entry {name!r}; known entries: {', '.join(_LONGEST)}")
            if lengths.max > _LONGEST[name]:
                raise InvalidRequestError(f"profile for {name!r}: {lengths} exceeds {_LONGEST[name]}")
        steps, guidance = self.steps, self.guidance
        if steps is not None and (type(steps) is not int or not 1 <= steps <= _MOST_STEPS):
            raise InvalidRequestError(f"steps is {steps!r}, expected a whole number from 1 to {_MOST_STEPS}")
        if guidance is not None and not 0 <= guidance <= _MOST_GUIDANCE:  # also when it is NaN
            raise InvalidRequestError(
                f"guidance is {guidance}, expected 0 to {_MOST_GUIDANCE} (7.5 is usual, 1 is none)"
            )
        if self.calibration is None and self.precision not in ("fp32", "fp16", "bf16"):
            raise InvalidRequestError(
                f"{self.precision} learns its ranges from pictures; calibrate, or take fp16 or bf16"
            )
        if self.calibration is None and self.precision != "fp32" and self.verify:
            raise InvalidRequestError(
                "without calibration no pictures are drawn that could be compared with those of fp32; "
                "calibrate, or do not verify"
            )
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InvalidRequestError(f"unknown sampler {self.sampler!r}; known samplers: {', '.join(SAMPLERS)}")


def defaults_of(request: BuildRequest, source: Source, older: m.Defaults | None = None) -> m.Defaults:
    """What a request that names nothing gets: as asked for, else as ``older`` has it, else as is usual."""
    family = source.family
    width, height = family.size(source)
    steps, guidance = family.usual(source)
    usual = older or m.Defaults(default_sampler(source.scheduler), steps, guidance, width, height, clip_skip=0)
    return dataclasses.replace(
        usual,
        sampler=request.sampler or usual.sampler,
        steps=usual.steps if request.steps is None else request.steps,
        guidance=usual.guidance if request.guidance is None else request.guidance,
    )
