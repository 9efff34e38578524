"""Append guidance and the sampler's update to a denoiser's step, so that a step of the loop is one engine call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .builder import Builder
from .guidance import BATCH

REGISTERS, TERMS = "registers", "terms"
"""Names of dimensions: the R registers of a sampler's plan, and the R + 2 terms of its update."""

RESULT = "updated_registers"
"""Name of the output of a fused step."""

_FLOAT = ir.DataType.FLOAT
_Dimensions = Sequence[int | str | ir.SymbolicDim]


def fuse_update(graph: ir.Graph, *, sample: str, prediction: str) -> None:
    """Turn a shared step (:func:`~latentrt.exporter.passes.guidance.share_guidance`) into one step of the whole loop.

    A sampler's plan writes each step as a linear map of the registers, the guided prediction and noise, see
    :class:`latentrt.runtime.samplers.Plan`. The map's factors are inputs of the graph, so the graph serves every
    sampler. The new inputs have one entry for each sample, so that samples may be at different steps of different
    samplers:

    - ``registers`` fp32 ``[batch, registers, ...]``: the plan's registers, of which the first is the latent,
    - ``noise`` fp32 ``[batch, ...]``, ``update`` fp32 ``[batch, registers, terms]`` and ``input_scale`` fp32
      ``[batch]``: noise and a row of the plan,
    - ``guidance`` and ``guidance_rescale`` fp32 ``[batch]``,
    - ``unconditional`` and ``conditional`` int64 ``[batch]``: indices of each sample's two rows; equal ones without
      guidance.

    The output ``updated_registers`` has the shape of ``registers``. All of this is fp32 whatever the precision of the
    denoiser, since rounding errors of the registers would add up from step to step.

    Steps:
        1. The model's input becomes ``input_scale * registers[:, 0]``, in the element type that the model takes.
        2. Guidance extrapolates from the unconditional row: ``u + guidance * (c - u)`` (Ho and Salimans 2022, arXiv
           2207.12598).
        3. A share ``guidance_rescale`` of the result is brought to the conditional row's standard deviation (Lin et al.
           2023, arXiv 2305.08891, equations 15 and 16).
        4. The update is ``update @ [registers; guided prediction; noise]`` for each sample.

    Args:
        graph: Changed in place; loses the input ``sample`` and the output ``prediction``.
        sample: Name of the latents' input, ``[batch, ...]``.
        prediction: Name of the prediction's output, ``[rows, ...]``.

    Raises:
        ValueError: if there is no such input or output, or its type is unknown.
    """
    latents = next((value for value in graph.inputs if value.name == sample), None)
    output = next((value for value in graph.outputs if value.name == prediction), None)
    if latents is None or latents.shape is None or latents.dtype is None or output is None or output.dtype is None:
        raise ValueError(f"the graph has no input {sample!r} and output {prediction!r} of known types")
    builder = Builder(graph, "update")
    inputs = _declare_inputs(builder, list(latents.shape)[1:])
    _read_latent(builder, inputs.registers, inputs.scale, latents)  # step 1

    # The rest stands behind the model, in fp32.
    result = output
    if output.dtype != _FLOAT:
        result = builder.add("Cast", [result], _FLOAT, output.shape, to=_FLOAT.value)
    guided = _guide(builder, result, inputs)  # steps 2 and 3
    final = _update(builder, guided, inputs)  # step 4
    final.name = RESULT
    graph.outputs[list(graph.outputs).index(output)] = final


def read_registers(graph: ir.Graph, *, sample: str) -> None:
    """Apply step 1 of :func:`fuse_update` alone, for a network that runs beside the denoiser on the same latents.

    Args:
        graph: Changed in place; takes ``registers`` and ``input_scale`` instead of ``sample``.
        sample: Name of the latents' input, ``[batch, ...]``.

    Raises:
        ValueError: if there is no such input, or its type is unknown.
    """
    latents = next((value for value in graph.inputs if value.name == sample), None)
    if latents is None or latents.shape is None or latents.dtype is None:
        raise ValueError(f"the graph has no input {sample!r} of known type")
    builder = Builder(graph, "update")
    registers = builder.input("registers", _FLOAT, [BATCH, REGISTERS, *list(latents.shape)[1:]])
    _read_latent(builder, registers, builder.input("input_scale", _FLOAT, [BATCH]), latents)


@dataclass(frozen=True)
class _Inputs:
    """The inputs that a fused step gains, see :func:`fuse_update`.

    Attributes:
        element: _Dimensions of one sample.
        column: Constant shape ``[-1, 1, ...]``, which turns a vector over samples into factors of whole samples.
    """

    element: _Dimensions
    registers: ir.Value
    noise: ir.Value
    update: ir.Value
    scale: ir.Value
    guidance: ir.Value
    rescale: ir.Value
    unconditional: ir.Value
    conditional: ir.Value
    column: ir.Value


def _declare_inputs(builder: Builder, element: _Dimensions) -> _Inputs:
    return _Inputs(
        element,
        builder.input("registers", _FLOAT, [BATCH, REGISTERS, *element]),
        builder.input("noise", _FLOAT, [BATCH, *element]),
        builder.input("update", _FLOAT, [BATCH, REGISTERS, TERMS]),
        builder.input("input_scale", _FLOAT, [BATCH]),
        builder.input("guidance", _FLOAT, [BATCH]),
        builder.input("guidance_rescale", _FLOAT, [BATCH]),
        builder.input("unconditional", ir.DataType.INT64, [BATCH]),
        builder.input("conditional", ir.DataType.INT64, [BATCH]),
        builder.constant([-1, *[1] * len(element)]),
    )


def _read_latent(builder: Builder, registers: ir.Value, scale: ir.Value, latents: ir.Value) -> None:
    """Replace the input ``latents`` by the scaled first register (step 1), computed in front of all nodes."""
    graph = builder.graph
    assert latents.shape is not None
    assert latents.dtype is not None
    element = list(latents.shape)[1:]
    full = [BATCH, *element]
    builder.before = next(iter(graph), None)
    latent = builder.add("Gather", [registers, builder.constant(0)], _FLOAT, full, axis=1)
    column = builder.constant([-1, *[1] * len(element)])
    factor = builder.add("Reshape", [scale, column], _FLOAT, [BATCH, *[1] * len(element)])
    model_input = builder.add("Mul", [latent, factor], _FLOAT, full)
    if latents.dtype != _FLOAT:
        model_input = builder.add("Cast", [model_input], latents.dtype, full, to=latents.dtype.value)
    ir.convenience.replace_all_uses_with(latents, model_input)
    graph.inputs.remove(latents)
    builder.before = None


def _guide(builder: Builder, predictions: ir.Value, inputs: _Inputs) -> ir.Value:
    """Return each sample's guided prediction (steps 2 and 3) from predictions ``[rows, ...]``."""
    full, ones = [BATCH, *inputs.element], [BATCH, *[1] * len(inputs.element)]
    # Step 2. A sample without guidance has the same row twice, and its direction is zero.
    unconditional = builder.add("Gather", [predictions, inputs.unconditional], _FLOAT, full, axis=0)
    conditional = builder.add("Gather", [predictions, inputs.conditional], _FLOAT, full, axis=0)
    weight = builder.add("Reshape", [inputs.guidance, inputs.column], _FLOAT, ones)
    direction = builder.add("Sub", [conditional, unconditional], _FLOAT, full)
    guided = builder.add("Add", [unconditional, builder.add("Mul", [weight, direction], _FLOAT, full)], _FLOAT, full)
    # Step 3.
    share = builder.add("Reshape", [inputs.rescale, inputs.column], _FLOAT, ones)
    factor = _rescaling(builder, guided, conditional, share, len(inputs.element))
    return builder.add("Mul", [guided, factor], _FLOAT, full)


def _rescaling(builder: Builder, guided: ir.Value, conditional: ir.Value, share: ir.Value, rank: int) -> ir.Value:
    """Return ``share * std(conditional) / std(guided) + (1 - share)``, over all dimensions of a sample."""
    axes = builder.constant(list(range(1, rank + 1)))
    ones = [BATCH, *[1] * rank]

    def deviation(value: ir.Value) -> ir.Value:
        mean = builder.add("ReduceMean", [value, axes], _FLOAT, ones, keepdims=1)
        centred = builder.add("Sub", [value, mean], _FLOAT, value.shape)
        square = builder.add("Mul", [centred, centred], _FLOAT, value.shape)
        variance = builder.add("ReduceMean", [square, axes], _FLOAT, ones, keepdims=1)
        return builder.add("Sqrt", [variance], _FLOAT, ones)

    least = builder.constant(1e-12, np.float32)  # a constant prediction has no deviation to divide by
    below = builder.add("Max", [deviation(guided), least], _FLOAT, ones)
    ratio = builder.add("Div", [deviation(conditional), below], _FLOAT, ones)
    # As 1 + share * (ratio - 1), which is exactly 1 where the share is 0: without rescaling nothing is rounded.
    excess = builder.add("Sub", [ratio, builder.constant(1, np.float32)], _FLOAT, ones)
    change = builder.add("Mul", [share, excess], _FLOAT, ones)
    return builder.add("Add", [change, builder.constant(1, np.float32)], _FLOAT, ones)


def _update(builder: Builder, guided: ir.Value, inputs: _Inputs) -> ir.Value:
    """Return the registers after the plan's update (step 4)."""
    element, axis = inputs.element, builder.constant([1])
    one = [BATCH, 1, *element]
    columns = [builder.add("Unsqueeze", [value, axis], _FLOAT, one) for value in (guided, inputs.noise)]
    terms = builder.add("Concat", [inputs.registers, *columns], _FLOAT, [BATCH, TERMS, *element], axis=1)
    # Not as a MatMul: OpenVINO computes products of matrices in bf16 where that is asked for, and would round the
    # registers at every step. Whatever follows the last product of matrices stays in fp32 there.
    ones = [1] * len(element)
    shape = builder.constant([0, 0, 0, *ones])  # 0: the length of the input
    factors = builder.add("Reshape", [inputs.update, shape], _FLOAT, [BATCH, REGISTERS, TERMS, *ones])
    each = builder.add("Unsqueeze", [terms, axis], _FLOAT, [BATCH, 1, TERMS, *element])
    weighted = builder.add("Mul", [factors, each], _FLOAT, [BATCH, REGISTERS, TERMS, *element])
    axes = builder.constant([2])
    return builder.add("ReduceSum", [weighted, axes], _FLOAT, [BATCH, REGISTERS, *element], keepdims=0)
