"""The table of engine kinds. To add one, write its module and name its kind here."""

from __future__ import annotations

from .errors import InvalidRequestError
from .kind import EngineKind
from .onnxrt import ONNX_RUNTIME
from .onnxrt_gpu import GPU_KINDS
from .openvino.kind import OPENVINO
from .trt.kind import TENSORRT, TENSORRT_RTX

KINDS: dict[str, EngineKind] = {
    kind.name: kind for kind in (ONNX_RUNTIME, OPENVINO, *GPU_KINDS, TENSORRT, TENSORRT_RTX)
}
"""Engine kinds by name, in the order in which they are listed."""


def kind_of(name: str) -> EngineKind:
    """The kind of a name.

    Raises:
        InvalidRequestError: listing the names that are known.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise InvalidRequestError(f"unknown engine {name!r}; known engines: {', '.join(KINDS)}, auto")
    return KINDS[name]


def automatic_kinds() -> list[EngineKind]:
    """The kinds that ``"auto"`` chooses from, the best first.

    On a CPU, ONNX Runtime comes first for small models. Of the emoji model in fp32, on two cores with AVX2, a step
    takes OpenVINO 1.09 times as long (1.15 times the processor's time on one thread, 1.13 with fixed lengths), and a
    bundle opens four times as fast unless its OpenVINO models are compiled already. Where OpenVINO goes first is in
    :func:`latentrt.runtime.components.engine_choice.automatic`. ONNX Runtime's providers for TensorRT are left out:
    they build at the first request.
    """
    ranked = [(kind.priority, kind) for kind in KINDS.values() if kind.priority is not None]
    return [kind for _, kind in sorted(ranked, key=lambda each: each[0])]
