"""Forms of exported graphs, and which of them each engine takes.

ONNX Runtime's CPU kernels and OpenVINO are fastest on decomposed attention and group normalisation, which their own
optimisers recognise; TensorRT and TensorRT-RTX take the native operators ``Attention`` and ``GroupNormalization`` and
choose a kernel themselves. Networks are strongly typed there, so precision is a property of the graph. Which form an
engine takes is in its :class:`~latentrt.engines.kind.EngineKind`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.kind import EngineKind
from latentrt.engines.kinds import KINDS
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
        """The part of the graph's file name between ``model`` and ``.onnx``; empty for the portable form."""
        return "" if self == PORTABLE else f".{self.name}"

    @property
    def quantized(self) -> bool:
        """Whether products are computed in 8 bits, or weights stored in 8 bits."""
        return self.precision in QUANTIZED


PORTABLE = Form(20, "fp32")
"""The form that every tool reads; images of reduced precision are compared with its images."""

QUANTIZED = ("int8", "fp8", "int8-weights")
"""Precisions whose graphs are made by quantising a graph of another form."""

TARGETS: Mapping[str, EngineKind] = KINDS
"""Engines that a bundle can be built for."""


def form_for(engine: str, precision: str) -> Form:
    """Return the form that ``engine`` takes at ``precision``.

    Raises:
        InvalidRequestError: for an unknown engine, or a precision that the engine does not compute in.
    """
    if engine not in TARGETS:
        raise InvalidRequestError(f"unknown engine {engine!r}; known engines: {', '.join(TARGETS)}")
    check_precision(engine, precision)
    kind = KINDS[engine]
    return Form(kind.form.opset, kind.rounds.get(precision, precision))


def exported_form(form: Form) -> Form:
    """The form that torch exports for ``form``: the form itself, or the one that is quantised to make it."""
    if not form.quantized:
        return form
    unquantized = {kind.form.opset: kind.form.unquantized for kind in KINDS.values()}
    return Form(form.opset, unquantized[form.opset])


def next_higher(engine: str, precision: str) -> str:
    """The precision that ``precision`` should be faster than on an engine: that of unquantised products, or fp32."""
    return KINDS[engine].form.unquantized if precision in QUANTIZED else "fp32"
