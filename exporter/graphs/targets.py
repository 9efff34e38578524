"""What each engine wants from an exported graph: one table.

ONNX Runtime's CPU kernels and OpenVINO are fastest on decomposed attention and group normalisation, which their own
optimisers recognise (OpenVINO's bf16 takes twice as long on the native operators); TensorRT and TensorRT-RTX take the
native operators ``Attention`` and ``GroupNormalization`` and choose a kernel themselves. Networks are strongly typed
there, so precision is a property of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.bundle.manifest import PRECISIONS as PRECISIONS
from latentrt.runtime.components.engine_probe import check_precision


@dataclass(frozen=True)
class Form:
    """One way in which a component is exported.

    Attributes:
        opset: ONNX operator set. From 21 on group normalisation, and from 23 on attention, are single operators.
        precision: Element type of weights and activations (``"fp32"``, ``"fp16"``, ``"bf16"``), or how products are
            quantised (``"int8"``, ``"fp8"``, ``"int8-weights"``).
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
        return "" if self == PORTABLE else f".{self.name}"

    @property
    def quantized(self) -> bool:
        """Whether products are computed in, or weights stored in, 8 bits."""
        return self.precision in QUANTIZED


@dataclass(frozen=True)
class Target:
    """What an engine takes.

    Attributes:
        opset: Operator set of its graphs.
        rest: Precision of everything that is not quantised where products are.
    """

    opset: int
    rest: str


PORTABLE = Form(20, "fp32")
"""The form that every tool reads; pictures of reduced precision are compared with what it draws."""

QUANTIZED = ("int8", "fp8", "int8-weights")
"""Precisions made by quantising another form."""

_DECOMPOSED, _NATIVE = Target(20, "fp32"), Target(23, "fp16")

# ONNX Runtime's CUDA provider lacks kernels for the native operators.
TARGETS: Mapping[str, Target] = {
    "onnxruntime": _DECOMPOSED,
    "openvino": _DECOMPOSED,
    "onnxruntime-cuda": _DECOMPOSED,
    "onnxruntime-tensorrt": _NATIVE,
    "onnxruntime-tensorrt-rtx": _NATIVE,
    "tensorrt": _NATIVE,
    "tensorrt-rtx": _NATIVE,
}
"""Engines that a bundle can be built for."""


def form_for(engine: str, precision: str) -> Form:
    """The form that ``engine`` takes at ``precision``.

    Raises:
        InvalidRequestError: for an unknown engine or precision, or one that the engine does not have.
    """
    if engine not in TARGETS:
        raise InvalidRequestError(f"unknown engine {engine!r}; known engines: {', '.join(TARGETS)}")
    check_precision(engine, precision)
    if engine == "openvino" and precision == "bf16":
        return PORTABLE  # which it rounds by itself
    return Form(TARGETS[engine].opset, precision)


def exported_form(form: Form) -> Form:
    """The form that torch exports for ``form``: itself, or what is quantised to make it."""
    if not form.quantized:
        return form
    rest = {target.opset: target.rest for target in TARGETS.values()}
    return Form(form.opset, rest[form.opset])


def next_higher(engine: str, precision: str) -> str:
    """The precision of an engine that ``precision`` should be faster than: what is not quantised has it, or fp32."""
    return TARGETS[engine].rest if precision in QUANTIZED else "fp32"
