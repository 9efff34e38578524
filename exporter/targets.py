"""What each engine wants from an exported graph: one table.

ONNX Runtime's CPU kernels and OpenVINO are fastest on decomposed attention and group normalisation, which their own
optimisers recognise (OpenVINO's bf16 takes twice as long on the native operators); TensorRT and TensorRT-RTX take the
native operators ``Attention`` and ``GroupNormalization`` and choose a kernel themselves. Networks are strongly typed
there, so precision is a property of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from latentrt.engines.errors import InvalidRequestError


@dataclass(frozen=True)
class Form:
    """One way in which a component is exported.

    Attributes:
        opset: ONNX operator set. From 21 on group normalisation, and from 23 on attention, are single operators.
        precision: Element type of weights and activations, ``"fp32"`` or ``"fp16"``.
    """

    opset: int
    precision: str

    @property
    def name(self) -> str:
        """Key of the form in a manifest, e.g. ``"opset20-fp32"``."""
        return f"opset{self.opset}-{self.precision}"

    @property
    def suffix(self) -> str:
        """What the graph's file name carries between ``model`` and ``.onnx``; nothing for the portable form."""
        return "" if self.name == "opset20-fp32" else f".{self.name}"


OPSETS = {"onnxruntime": 20, "openvino": 20, "tensorrt": 23, "tensorrt-rtx": 23}
"""Engines that a bundle can be built for, and the operator set that each takes."""
PRECISIONS = ("fp32", "fp16")


def form_for(engine: str, precision: str) -> Form:
    """The form that ``engine`` takes at ``precision``.

    Raises:
        InvalidRequestError: for an unknown engine or precision.
    """
    if engine not in OPSETS:
        raise InvalidRequestError(f"unknown engine {engine!r}; known engines: {', '.join(OPSETS)}")
    if precision not in PRECISIONS:
        raise InvalidRequestError(f"unknown precision {precision!r}; known precisions: {', '.join(PRECISIONS)}")
    return Form(OPSETS[engine], precision)
