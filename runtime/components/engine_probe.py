"""Which engines can run here, at which precisions, and what is missing where one cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from latentrt.engines import onnxrt, onnxrt_gpu
from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError
from latentrt.engines.openvino import engine as ov
from latentrt.engines.trt import SDK_MODULES, load_sdk
from latentrt.engines.trt.cuda import cuda_devices
from latentrt.engines.trt.cudart import load_cuda

from ..bundle.manifest import PRECISIONS

_ON_TENSORRT = ("fp32", "fp16", "bf16", "int8", "fp8")

SUPPORTED: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "fp16", "int8", "int8-weights"),
    "openvino": ("fp32", "fp16", "bf16", "int8", "int8-weights"),
    "onnxruntime-cuda": ("fp32", "fp16"),
    "onnxruntime-tensorrt": _ON_TENSORRT,
    "onnxruntime-tensorrt-rtx": _ON_TENSORRT,
    "tensorrt": _ON_TENSORRT,
    "tensorrt-rtx": _ON_TENSORRT,
}
"""Engines by name, and the precisions that each has kernels for.

ONNX Runtime has no bf16 and no fp8 arithmetic on a CPU, OpenVINO no fp8. The graphs that ONNX Runtime's CUDA provider
takes are of operator set 20, in which ONNX has no convolution of bf16. TensorRT multiplies 8-bit weights with 8-bit
activations only.
"""

PRESENT, MISSING, UNUSABLE = "present", "missing", "unusable"
"""States of an engine: it runs here; something must be installed first; it is installed and cannot run here."""

# The first architectures with tensor cores for these types (CUDA C++ Programming Guide, compute capabilities).
_OLDEST_GPU = {"bf16": 80, "fp8": 89}


@dataclass(frozen=True)
class Availability:
    """What was found of one engine.

    Attributes:
        name: A key of :data:`SUPPORTED`.
        state: :data:`PRESENT`, :data:`MISSING` or :data:`UNUSABLE`.
        version: Version of its SDK; empty where it is missing.
        detail: What it runs on; or what is missing and how to get it; or why it cannot run.
    """

    name: str
    state: str
    version: str
    detail: str


def probe(name: str) -> Availability:
    """Look whether an engine can run here, by loading its SDK.

    Args:
        name: A key of :data:`SUPPORTED`.
    """
    version = ""
    try:
        version = _VERSIONS[name](name)
    except EngineUnavailableError as error:
        return Availability(name, MISSING, version, str(error))
    if name == "onnxruntime":
        return Availability(name, PRESENT, version, "CPU")
    if name == "openvino":
        abilities = ov.load_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        known = [precision.lower() for precision in ("FP32", "BF16") if precision in abilities]
        return Availability(name, PRESENT, version, f"CPU: {', '.join(known)}")
    if not (devices := cuda_devices()):
        reason = f"{name} needs an NVIDIA GPU and its driver, and no CUDA device was found; use the engine onnxruntime"
        return Availability(name, UNUSABLE, version, reason)
    if name in SDK_MODULES:
        try:
            load_cuda()
        except EngineUnavailableError as error:
            return Availability(name, MISSING, version, str(error))
    return Availability(name, PRESENT, version, f"{devices[0].name} ({devices[0].architecture})")


def _onnxruntime(_: str) -> str:
    return str(onnxrt.load_sdk().__version__)


def _provider(name: str) -> str:
    ort = onnxrt.load_sdk()
    onnxrt_gpu.find_provider(ort, name)
    return str(ort.__version__)


_VERSIONS: Mapping[str, Callable[[str], str]] = {
    "onnxruntime": _onnxruntime,
    "openvino": lambda _: str(ov.load_sdk().__version__).partition("-")[0],
    **dict.fromkeys(onnxrt_gpu.PROVIDERS, _provider),
    "tensorrt": lambda name: load_sdk(name).version,
    "tensorrt-rtx": lambda name: load_sdk(name).version,
}


def check_engine(name: str, precision: str | None) -> None:
    """Refuse an engine or a precision that cannot run here, before anything is opened.

    Raises:
        InvalidRequestError: if the name or the precision is unknown, or the engine never computes in it.
        EngineUnavailableError: if something is missing on this machine; the message says what.
    """
    check_precision(name, precision)
    found = probe(name)
    if found.state != PRESENT:
        raise EngineUnavailableError(found.detail)
    if name == "openvino":
        ov.require_precision(ov.load_core(), precision or "fp32")
    elif name != "onnxruntime" and precision in _OLDEST_GPU:
        device = cuda_devices()[0]
        if int(device.architecture.removeprefix("sm_")) < _OLDEST_GPU[precision]:
            raise EngineUnavailableError(
                f"{device.name} ({device.architecture}) has no instructions for {precision}, which came with "
                f"sm_{_OLDEST_GPU[precision]}; choose precision fp16"
            )


def check_precision(name: str, precision: str | None) -> None:
    """Refuse what no machine could run.

    Raises:
        InvalidRequestError: if the name or the precision is unknown, or the engine never computes in it.
    """
    if name not in SUPPORTED:
        raise InvalidRequestError(f"unknown engine {name!r}; known engines: {', '.join(SUPPORTED)}, auto")
    if precision is None:
        return
    if precision not in PRECISIONS:
        raise InvalidRequestError(f"unknown precision {precision!r}; known precisions: {', '.join(PRECISIONS)}")
    if precision not in SUPPORTED[name]:
        others = ", ".join(engine for engine, known in SUPPORTED.items() if precision in known)
        raise InvalidRequestError(
            f"{name} does not compute in {precision}; choose {', '.join(SUPPORTED[name])}, "
            f"or one of the engines {others}"
        )
