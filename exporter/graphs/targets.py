"""The form of graph that each engine takes, in one table.

ONNX Runtime's CPU kernels and OpenVINO are fastest on decomposed attention and group normalisation, which their own
optimisers recognise (OpenVINO's bf16 takes twice as long on the native operators). TensorRT and TensorRT-RTX take the
native operators ``Attention`` and ``GroupNormalization`` and choose a kernel themselves; their networks are strongly
typed, so precision is a property of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.bundle.manifest import PRECISIONS as PRECISIONS
from latentrt.runtime.components.engine_probe import check_precision


@dataclass(frozen=True)
class Form:
    """A form that a component is exported in.

    Attributes:
        opset: ONNX operator set. Group normalisation is a single operator from 21 on, attention from 23 on.
        precision: Element type of weights and activations (``"fp32"``, ``"fp16"``, ``"bf16"``), or the quantisation of
            products (``"int8"``, ``"fp8"``, ``"int8-weights"``).
    """

    opset: int
    precision: str

    @property
    def name(self) -> str:
        """Key of the form in a manifest, such as ``"opset20-fp32"``."""
        return f"opset{self.opset}-{self.precision}"

    @property
    def suffix(self) -> str:
        """Part of the graph's file name between ``model`` and ``.onnx``; empty for the portable form."""
        return "" if self == PORTABLE else f".{self.name}"

    @property
    def quantized(self) -> bool:
        """Whether products are computed in 8 bits, or weights stored in 8 bits."""
        return self.precision in QUANTIZED


@dataclass(frozen=True)
class Target:
    """The graphs that an engine takes.

    Attributes:
        opset: Operator set of its graphs.
        rest: Precision, in a quantised graph, of everything that is not quantised.
    """

    opset: int
    rest: str


PORTABLE = Form(20, "fp32")
"""The form that every tool reads. Images of reduced precision are compared with those that it draws."""

QUANTIZED = ("int8", "fp8", "int8-weights")
"""Precisions whose graphs are made by quantising a graph of another form."""

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
    """Return the form that ``engine`` takes at ``precision``.

    Raises:
        InvalidRequestError: for an unknown engine, or a precision that the engine does not compute in.
    """
    if engine not in TARGETS:
        raise InvalidRequestError(f"unknown engine {engine!r}; known engines: {', '.join(TARGETS)}")
    check_precision(engine, precision)
    if engine == "openvino" and precision == "bf16":
        return PORTABLE  # OpenVINO rounds an fp32 graph by itself
    return Form(TARGETS[engine].opset, precision)


def exported_form(form: Form) -> Form:
    """Return the form that torch exports for ``form``: itself, or the one that is quantised to make it."""
    if not form.quantized:
        return form
    rest = {target.opset: target.rest for target in TARGETS.values()}
    return Form(form.opset, rest[form.opset])


def next_higher(engine: str, precision: str) -> str:
    """Return the precision that ``precision`` should be faster than on an engine.

    For a quantised one that is the precision of what is not quantised, and for half precision fp32.
    """
    return TARGETS[engine].rest if precision in QUANTIZED else "fp32"
