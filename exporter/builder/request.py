"""The request of a build, checked before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latentrt.engines.checks import check_integer, check_number
from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.trt import BuildOptions, Range
from latentrt.runtime.bundle import manifest as m
from latentrt.runtime.lora.reading import LoraFile
from latentrt.runtime.request.options import MAX_SIDE
from latentrt.runtime.samplers import SAMPLERS, default_sampler

from ..adapters.base import AdapterFiles
from ..adapters.controlnet import ControlNetFile, ControlNetFiles
from ..adapters.ip_adapter import IpAdapterFiles
from ..adapters.lora import LoraFiles
from ..adapters.safety_checker import SafetyCheckerFiles
from ..adapters.tiny_vae import TinyVaeFiles
from ..graphs.targets import TARGETS, form_for
from ..precision.calibration import Calibration
from ..precision.reduce import Quantization
from ..source.opening import Reading
from ..source.source import Source

_LONGEST = {"batch": 4096, "height": MAX_SIDE, "width": MAX_SIDE}
_MOST_STEPS, _MOST_GUIDANCE = 10_000, 1000  # as in a manifest


@dataclass(frozen=True)
class BuildRequest:
    """A source, the bundle to build of it, and all settings of the build.

    Attributes:
        source: A diffusers directory, a single-file checkpoint, or the name of a model on a hub.
        output: Directory of the bundle. A bundle that is there already is extended if it comes from the same source
            and adapters, and else replaced.
        engines: Engines to build for, keys of :data:`latentrt.exporter.graphs.targets.TARGETS`.
        precision: One of :data:`latentrt.runtime.bundle.manifest.PRECISIONS` that all of the engines have.
        ranges: Lengths that compiled engines are built for: ``batch`` (images), ``height`` and ``width`` (pixels).
            One that is left out is one image, or the size that the model was trained on.
        verify: Compare every exported component with torch, and images of a reduced precision with those of fp32.
        options: Settings of TensorRT builds.
        steps: Sampler steps that the bundle uses by default; ``None`` keeps those of a bundle that is extended, or
            takes those of the family.
        guidance: Guidance scale that the bundle uses by default; ``None`` keeps that of a bundle that is extended, or
            takes that of the family.
        sampler: Sampler that the bundle uses by default; ``None`` keeps that of a bundle that is extended, or takes
            the one of the source's scheduler.
        calibration: Images that are drawn for a reduced precision, to learn ranges and to compare with fp32. ``None``
            draws none, for models that cannot be run here: values of fp16 are kept in range on example inputs alone.
            It goes with fp16 and bf16 that are not compared.
        quantization: How the layers are chosen that are computed in 8 bits.
        accept_quality: Keep a reduced precision whose images are below the gate.
        loras: LoRAs to fuse into the weights, one after the other.
        tiny_vae: A directory of diffusers' AutoencoderTiny, whose decoder the bundle gets beside the model's own.
        controlnets: Directories of diffusers' ControlNetModel, with the names that requests use.
        ip_adapter: An IP-Adapter and its image encoder.
        safety_checker: A directory of diffusers' StableDiffusionSafetyChecker, or of a model that has one, for requests
            that want their images checked.
        adapters: Files of adapters of any kind, at most one entry of a kind; a kind that one of the five fields above
            names is not given here too.
        reading: Settings that the source does not have itself.
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
    adapters: Sequence[AdapterFiles] = ()
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
        if self.steps is not None:
            object.__setattr__(self, "steps", check_integer("steps", self.steps, 1, _MOST_STEPS))
        if self.guidance is not None:
            hint = " (7.5 is usual, 1 is none)"
            guidance = check_number("guidance", self.guidance, 0, _MOST_GUIDANCE, hint=hint)
            object.__setattr__(self, "guidance", guidance)
        if self.calibration is None and self.precision not in ("fp32", "fp16", "bf16"):
            raise InvalidRequestError(
                f"{self.precision} learns its ranges from images; calibrate, or take fp16 or bf16"
            )
        if self.calibration is None and self.precision != "fp32" and self.verify:
            raise InvalidRequestError(
                "without calibration no images are drawn that could be compared with those of fp32; "
                "calibrate, or do not verify"
            )
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InvalidRequestError(f"unknown sampler {self.sampler!r}; known samplers: {', '.join(SAMPLERS)}")

    @property
    def adapter_files(self) -> tuple[AdapterFiles, ...]:
        """Files of all adapters: those of the fields that name a kind, and :attr:`adapters`."""
        named = (
            LoraFiles(tuple(self.loras)) if self.loras else None,
            None if self.tiny_vae is None else TinyVaeFiles(self.tiny_vae),
            ControlNetFiles(tuple(self.controlnets)) if self.controlnets else None,
            self.ip_adapter,
            None if self.safety_checker is None else SafetyCheckerFiles(self.safety_checker),
        )
        return (*(files for files in named if files is not None), *self.adapters)


def defaults_of(request: BuildRequest, source: Source, older: m.Defaults | None = None) -> m.Defaults:
    """Options of a pipeline's request that names none.

    Args:
        request: Its own settings come first.
        source: The model, whose family and scheduler have defaults.
        older: Defaults of a bundle that is extended; they come second.
    """
    family = source.family
    width, height = family.size(source)
    steps, guidance = family.defaults(source)
    base = older or m.Defaults(default_sampler(source.scheduler), steps, guidance, width, height, clip_skip=0)
    return dataclasses.replace(
        base,
        sampler=request.sampler or base.sampler,
        steps=base.steps if request.steps is None else request.steps,
        guidance=base.guidance if request.guidance is None else request.guidance,
    )
