"""TensorRT and TensorRT-RTX as kinds of engines, and the common part of all kinds on an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import Engine
from ..errors import EngineUnavailableError
from ..kind import CUDA, NATIVE, EngineArguments, EngineKind
from .cuda import cuda_devices, no_device
from .cudart import load_cuda
from .sdk import load_sdk

TENSORRT_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
"""Precisions of TensorRT of every kind. It multiplies 8-bit weights with 8-bit activations only."""

# The first architectures with tensor cores for these types (CUDA C++ Programming Guide, compute capabilities).
_OLDEST_GPU = {"bf16": 80, "fp8": 89}


@dataclass(frozen=True)
class CudaKind(EngineKind):
    """A kind of engine that runs on an NVIDIA GPU, the first one unless its options say otherwise."""

    def runs_on(self) -> str:
        """Name and architecture of the GPU."""
        device = cuda_devices()[0]
        return f"{device.name} ({device.architecture})"

    def unusable(self) -> str:
        """That there is no GPU, where there is none."""
        return "" if cuda_devices() else no_device(self.name)

    def require(self, precision: str | None) -> None:
        """Refuse a precision that the GPU has no instructions for."""
        device = cuda_devices()[0]
        if precision in _OLDEST_GPU and int(device.architecture.removeprefix("sm_")) < _OLDEST_GPU[precision]:
            raise EngineUnavailableError(
                f"{device.name} ({device.architecture}) has no instructions for {precision}, which came with "
                f"sm_{_OLDEST_GPU[precision]}; choose precision fp16"
            )


@dataclass(frozen=True)
class TensorRTKind(CudaKind):
    """TensorRT or TensorRT-RTX, with plans that the exporter compiled."""

    def version(self) -> str:
        """Version of the SDK, in full."""
        return load_sdk(self.name).version

    def runs_on(self) -> str:
        """The GPU.

        Raises:
            EngineUnavailableError: if the Python package of CUDA is missing.
        """
        load_cuda()
        return super().runs_on()

    def builds_without_device(self) -> bool:
        """Whether the SDK is installed and builds plans without a GPU."""
        try:
            return load_sdk(self.name).builds_without_gpu
        except EngineUnavailableError:
            return False

    def make(self, arguments: EngineArguments) -> Engine:
        """The engine of one plan."""
        from .session import TensorRTEngine  # nobody without plans needs what runs them

        return TensorRTEngine(
            arguments.path,
            engine=self.name,
            target=arguments.target,
            signature=(arguments.inputs, arguments.outputs),
            label=f"{arguments.component} ({self.name})",
            weights=arguments.weights,
        )


TENSORRT, TENSORRT_RTX = (
    TensorRTKind(
        name=name,
        title=title,
        extra=name,
        device=CUDA,
        precisions=TENSORRT_PRECISIONS,
        form=NATIVE,
        priority=priority,
        needs_plans=True,
    )
    for name, title, priority in (("tensorrt", "TensorRT", 10), ("tensorrt-rtx", "TensorRT-RTX", 20))
)
