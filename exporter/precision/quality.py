"""Compare images of reduced precision with those of fp32, by PSNR and SSIM, and hold them to a gate."""

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
"""Least mean PSNR in dB of images against fp32, by precision."""

_FIRST_SEED = 1_000  # calibration draws with seeds from 0 on
_WINDOW, _SIGMA = 11, 1.5  # pixels
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass(frozen=True)
class ImageQuality:
    """Figures of images in one precision against those in fp32, from the same prompts and seeds.

    Attributes:
        psnr: Mean PSNR over images, in dB; equal images count as 100 dB.
        worst: PSNR of the worst image, in dB.
        ssim: Mean structural similarity, -1 to 1.
        slower: Median time of a step, divided by that of the precision it should be faster than; NaN if not measured.
    """

    psnr: float
    worst: float
    ssim: float
    slower: float = math.nan


def picture_psnr(reference: NDArray[np.uint8], received: NDArray[np.uint8]) -> float:
    """Return the PSNR in dB of two 8-bit images of one shape, at most 100."""
    error = float(np.square(reference.astype(np.float64) - received).mean())
    return 100.0 if error == 0 else min(100.0, 10 * math.log10(255**2 / error))


def picture_ssim(reference: NDArray[np.uint8], received: NDArray[np.uint8]) -> float:
    """Return the mean structural similarity of two 8-bit images ``[height, width, channels]``.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity": a Gaussian window of
    11 pixels with a standard deviation of 1.5, and the mean over channels and over all places where the window lies
    inside the image. Height and width are at least 11 pixels.
    """
    x, y = reference.astype(np.float64), received.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float((luminance * structure).mean())


def _blurred(image: NDArray[np.float64]) -> NDArray[np.float64]:
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    kernel = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        image = np.lib.stride_tricks.sliding_window_view(image, _WINDOW, axis=axis) @ kernel
    return image


@dataclass(frozen=True)
class Drawn:
    """Images of one pipeline, with the times of their steps.

    Attributes:
        images: uint8 ``[height, width, 3]`` each.
        steps: Seconds of every step.
    """

    images: list[NDArray[np.uint8]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def draw(
    pipelines: Sequence[Pipeline], calibration: Calibration, *, width: int | None = None, height: int | None = None
) -> list[Drawn]:
    """Draw the same images with several pipelines, in turn, so that other load on the machine slows down all alike.

    Args:
        pipelines: The pipelines.
        calibration: Prompts and steps; the first ``checked`` prompts are drawn, from seeds that calibration does not
            use.
        width: Width of the images in pixels; ``None`` takes the bundle's default.
        height: Height of the images in pixels; ``None`` takes the bundle's default.

    Returns:
        The images of each pipeline, in the pipelines' order.
    """
    drawn = [Drawn() for _ in pipelines]
    for number in range(calibration.checked):
        prompt, seed = calibration.prompts[number % len(calibration.prompts)], _FIRST_SEED + number
        for pipeline, into in zip(pipelines, drawn, strict=True):
            result = pipeline(prompt, seed=seed, steps=calibration.steps, width=width, height=height)
            into.images.append(result.images[0])
            into.steps.extend(result.timings.step)
    return drawn


def compare(reference: Drawn, candidate: Drawn, baseline: Drawn | None = None) -> ImageQuality:
    """Compute how close images are to the reference, and how much slower a step is than the baseline's."""
    pairs = list(zip(reference.images, candidate.images, strict=True))
    psnr = [picture_psnr(*pair) for pair in pairs]
    ssim = [picture_ssim(*pair) for pair in pairs]
    slower = math.nan if baseline is None else float(np.median(candidate.steps) / np.median(baseline.steps))
    return ImageQuality(float(np.mean(psnr)), min(psnr), float(np.mean(ssim)), slower)


def require(quality: ImageQuality, precision: str, label: str) -> None:
    """Hold images to the gate of their precision.

    Args:
        quality: Their figures.
        precision: A key of :data:`GATES`.
        label: Name of the engine in the message.

    Raises:
        VerificationError: if their mean PSNR is below the gate, or not a number; the message says what to do.
    """
    if not quality.psnr >= GATES[precision]:  # also when it is NaN
        raise VerificationError(
            f"{label}: images in {precision} agree with fp32 to {quality.psnr:.1f} dB (SSIM {quality.ssim:.3f}), at "
            f"least {GATES[precision]:.0f} dB are required; take a higher precision, calibrate on prompts of your own "
            "with --calibration, or accept this quality with --accept-quality"
        )


@dataclass(frozen=True)
class EngineComparison:
    """The result of comparing an engine's images in a reduced precision with those in fp32.

    Attributes:
        pictures: Figures of the images.
        emulated: Whether the engine was emulated, since it cannot run on this machine.
        faster: The precision that times were compared with.
    """

    pictures: ImageQuality
    emulated: bool
    faster: str

    def __str__(self) -> str:
        figures = f"{self.pictures.psnr:.1f} dB (worst {self.pictures.worst:.1f} dB), SSIM {self.pictures.ssim:.3f}"
        if self.emulated:
            return f"{figures}, emulated on the CPU"
        ratio = self.pictures.slower
        if ratio > 1:
            return f"{figures}; slower on this machine: a step takes {ratio:.2f} times as long as in {self.faster}"
        return f"{figures}; a step takes {ratio:.2f} of the time that {self.faster} takes"


def compare_engine(
    bundle: Bundle,
    engine: str,
    precision: str,
    calibration: Calibration,
    *,
    width: int | None = None,
    height: int | None = None,
) -> EngineComparison:
    """Compare images that an engine draws in a reduced precision with those of ONNX Runtime in fp32.

    Steps:
        1. ONNX Runtime draws the reference.
        2. An engine for CPUs draws in the precision and, for times, in the next higher one.
        3. An engine that needs a GPU, or instructions that this processor lacks, is emulated: ONNX Runtime computes in
           fp32 and rounds every value as the engine does. Then no times are compared.

    Args:
        bundle: The bundle.
        engine: Engine that it was built for.
        precision: The reduced precision.
        calibration: Prompts, steps, and the number of images.
        width: Width of the images in pixels; ``None`` takes the bundle's default.
        height: Height of the images in pixels; ``None`` takes the bundle's default.

    Raises:
        BundleError: if the bundle lacks a component or form that is compared.
        EngineError: if an engine fails.
    """
    # Step 1.
    higher, size = next_higher(engine, precision), {"width": width, "height": height}
    with _pipeline(bundle, "onnxruntime", "fp32") as pipeline:  # closed before step 2, since it may be large
        (reference,) = draw([pipeline], calibration, **size)
    # Step 2.
    with ExitStack() as stack:
        try:
            if KINDS[engine].device != CPU:
                raise EngineUnavailableError(f"{engine} needs a GPU")
            both = [stack.enter_context(_pipeline(bundle, engine, each)) for each in (precision, higher)]
        except EngineUnavailableError:
            # Step 3.
            form = form_for(engine, precision)
            lowered = ir.DataType.BFLOAT16 if form == PORTABLE else None
            pipeline, _ = stack.enter_context(emulated(bundle, form.name, rounded=True, lowered=lowered))
            (candidate,) = draw([pipeline], calibration, **size)
            return EngineComparison(compare(reference, candidate), True, higher)
        candidate, baseline = draw(both, calibration, **size)
        return EngineComparison(compare(reference, candidate, baseline), False, higher)


def _pipeline(bundle: Bundle, engine: str, precision: str) -> Pipeline:
    """Open a pipeline that compiles its engines anew, and closes those it has opened if one fails."""
    with ExitStack() as stack:
        engines = {}
        for name in components_for(bundle):
            engines[name] = make_engine(bundle, name, EngineSettings(engine, precision, engine_cache="off")).open()
            stack.callback(engines[name].close)
        pipeline = Pipeline(bundle, engines)
        stack.pop_all()
    return pipeline
