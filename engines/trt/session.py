"""Opening plans. They run on an NVIDIA GPU only, and that is said before any SDK is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..base import Array, BaseEngine, TensorSpec
from ..errors import EngineUnavailableError
from .cuda import cuda_devices


class TensorRTEngine(BaseEngine):
    """A plan of TensorRT or TensorRT-RTX.

    This version builds plans and does not run them: :meth:`open` always raises, and says why.

    Args:
        plan: The plan's file.
        engine: ``"tensorrt-rtx"`` or ``"tensorrt"``.
        target: What the plan was built for, as its record says, e.g. ``"sm_80+"``.
    """

    def __init__(self, plan: Path, *, engine: str, target: str) -> None:
        super().__init__(f"{plan.name} ({engine})")
        self.plan = plan
        self.engine = engine
        self.target = target

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        devices = cuda_devices()
        if not devices:
            raise EngineUnavailableError(
                f"{self.label} cannot be opened, no CUDA device was found: the plan was built for {self.target}; "
                "run it on a machine with an NVIDIA GPU and its driver, or use the engine onnxruntime"
            )
        raise EngineUnavailableError(
            f"{self.label} cannot be opened on {devices[0].name} ({devices[0].architecture}): this version of LatentRT "
            "builds plans and does not run them yet; use the engine onnxruntime"
        )

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        raise AssertionError("an engine that never opens is never run")
