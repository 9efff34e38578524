"""How close pictures are: PSNR and SSIM, and the gate that a build of reduced precision must pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.engines.errors import EngineUnavailableError, VerificationError
from latentrt.engines.kind import CPU
from latentrt.engines.kinds import KINDS
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.components.engine_choice import EngineSettings, make_engine
from latentrt.runtime.components.opening import components_for
from latentrt.runtime.pipeline import Pipeline

from ..graphs.targets import PORTABLE, form_for, next_higher
from ..verification.emulate import emulated
from .calibration import Calibration

GATES = {"fp16": 40.0, "bf16": 32.0, "int8": 25.0, "fp8": 22.0, "int8-weights": 32.0}
"""Least mean PSNR in dB of pictures against fp32, by precision."""

_FIRST_SEED = 1_000  # not one that calibration drew with
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass(frozen=True)
class PictureQuality:
    """Pictures of one precision against those of fp32, from the same prompts and seeds.

    Attributes:
        psnr: Mean PSNR over pictures, in dB; equal pictures count as 100 dB.
        worst: PSNR of the worst picture, in dB.
        ssim: Mean structural similarity, -1 to 1.
        slower: Median time of a step over that of the precision it should be faster than; NaN where not measured.
    """

    psnr: float
    worst: float
    ssim: float
    slower: float = math.nan


def picture_psnr(reference: NDArray[np.uint8], received: NDArray[np.uint8]) -> float:
    """PSNR in dB of 8-bit pictures, at most 100."""
    error = float(np.square(reference.astype(np.float64) - received).mean())
    return 100.0 if error == 0 else min(100.0, 10 * math.log10(255**2 / error))


def picture_ssim(reference: NDArray[np.uint8], received: NDArray[np.uint8]) -> float:
    """Mean structural similarity of two 8-bit pictures ``[height, width, channels]`` of at least 11 pixels a side.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity": a Gaussian window of
    11 pixels with a standard deviation of 1.5, the mean over the places that it fits and over channels.
    """
    x, y = reference.astype(np.float64), received.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float((luminance * structure).mean())


def _blurred(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    kernel = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        picture = np.lib.stride_tricks.sliding_window_view(picture, _WINDOW, axis=axis) @ kernel
    return picture


@dataclass(frozen=True)
class Drawn:
    """Pictures of one pipeline.

    Attributes:
        pictures: uint8 ``[height, width, 3]`` each.
        steps: Seconds of every step.
    """

    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def draw(
    pipelines: Sequence[Pipeline], calibration: Calibration, *, width: int | None = None, height: int | None = None
) -> list[Drawn]:
    """Draw the same pictures with several pipelines, in turn, so that what else the machine does meets all.

    Args:
        pipelines: The pipelines.
        calibration: What to draw; the first ``checked`` of its prompts, from other seeds than those of calibration.
        width: Pixels; ``None`` is the bundle's default.
        height: Likewise.
    """
    drawn = [Drawn() for _ in pipelines]
    for number in range(calibration.checked):
        prompt, seed = calibration.prompts[number % len(calibration.prompts)], _FIRST_SEED + number
        for pipeline, into in zip(pipelines, drawn, strict=True):
            result = pipeline(prompt, seed=seed, steps=calibration.steps, width=width, height=height)
            into.pictures.append(result.images[0])
            into.steps.extend(result.timings.step)
    return drawn


def compare(reference: Drawn, candidate: Drawn, baseline: Drawn | None = None) -> PictureQuality:
    """How close pictures are, and how much slower a step is than the baseline's."""
    pairs = list(zip(reference.pictures, candidate.pictures, strict=True))
    psnr = [picture_psnr(*pair) for pair in pairs]
    ssim = [picture_ssim(*pair) for pair in pairs]
    slower = math.nan if baseline is None else float(np.median(candidate.steps) / np.median(baseline.steps))
    return PictureQuality(float(np.mean(psnr)), min(psnr), float(np.mean(ssim)), slower)


def require(quality: PictureQuality, precision: str, label: str) -> None:
    """Hold pictures to the gate of their precision.

    Raises:
        VerificationError: saying what was measured, what is required, and what to do.
    """
    if not quality.psnr >= GATES[precision]:  # also when it is NaN
        raise VerificationError(
            f"{label}: pictures in {precision} agree with fp32 to {quality.psnr:.1f} dB (SSIM {quality.ssim:.3f}), at "
            f"least {GATES[precision]:.0f} dB are required; take a higher precision, calibrate on prompts of your own "
            "with --calibration, or take it as it is with --accept-quality"
        )


@dataclass(frozen=True)
class Judgement:
    """What comparing an engine's pictures came to.

    Attributes:
        pictures: The figures.
        emulated: Whether the engine was emulated, since it cannot run here.
        faster: The precision that times were compared with.
    """

    pictures: PictureQuality
    emulated: bool
    faster: str

    def __str__(self) -> str:
        told = f"{self.pictures.psnr:.1f} dB (worst {self.pictures.worst:.1f} dB), SSIM {self.pictures.ssim:.3f}"
        if self.emulated:
            return f"{told}, emulated on the CPU"
        ratio = self.pictures.slower
        if ratio > 1:
            return f"{told}; slower on this machine: a step takes {ratio:.2f} times as long as in {self.faster}"
        return f"{told}; a step takes {ratio:.2f} of the time that {self.faster} takes"


def compare_engine(
    bundle: Bundle,
    engine: str,
    precision: str,
    calibration: Calibration,
    *,
    width: int | None = None,
    height: int | None = None,
) -> Judgement:
    """Compare pictures that an engine draws in a reduced precision with those of ONNX Runtime in fp32.

    An engine that runs on a CPU is run; one that cannot run here is emulated, rounding every value as it does.

    Raises:
        BundleError: if the bundle lacks what is compared.
        EngineError: if an engine fails.
    """
    higher, size = next_higher(engine, precision), {"width": width, "height": height}
    with _pipeline(bundle, "onnxruntime", "fp32") as pipeline:  # closed again: several large models would not fit
        (reference,) = draw([pipeline], calibration, **size)
    with ExitStack() as stack:
        try:
            if KINDS[engine].device != CPU:
                raise EngineUnavailableError(f"{engine} needs a GPU")
            both = [stack.enter_context(_pipeline(bundle, engine, each)) for each in (precision, higher)]
        except EngineUnavailableError:
            form = form_for(engine, precision)
            lowered = ir.DataType.BFLOAT16 if form == PORTABLE else None
            pipeline, _ = stack.enter_context(emulated(bundle, form.name, rounded=True, lowered=lowered))
            (candidate,) = draw([pipeline], calibration, **size)
            return Judgement(compare(reference, candidate), True, higher)
        candidate, baseline = draw(both, calibration, **size)
        return Judgement(compare(reference, candidate, baseline), False, higher)


def _pipeline(bundle: Bundle, engine: str, precision: str) -> Pipeline:
    with ExitStack() as stack:
        engines = {}
        for name in components_for(bundle):
            engines[name] = make_engine(bundle, name, EngineSettings(engine, precision, engine_cache="off")).open()
            stack.callback(engines[name].close)
        pipeline = Pipeline(bundle, engines)
        stack.pop_all()
    return pipeline
