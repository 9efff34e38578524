"""Append guidance and the sampler's update to a step, so that a step of the loop is one engine call."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .builder import Builder
from .guidance import BATCH

REGISTERS, TERMS = "registers", "terms"
"""Names of dimensions: registers R of a sampler's plan, and the R + 2 terms of its update."""

RESULT = "updated_registers"
"""The output of a fused step."""

_FLOAT = ir.DataType.FLOAT


def fuse_update(graph: ir.Graph, *, sample: str, prediction: str) -> None:
    """Turn a shared step (:func:`~latentrt.exporter.passes.guidance.share_guidance`) into one step of the whole loop.

    The new inputs have one entry a sample, so that samples may be at different steps of different samplers:

    - ``registers`` fp32 ``[batch, registers, ...]``: the plan's registers; the first is the latent,
    - ``noise`` fp32 ``[batch, ...]``, ``update`` fp32 ``[batch, registers, terms]``, ``input_scale`` fp32 ``[batch]``:
      the plan's row, see :class:`latentrt.runtime.samplers.Plan`,
    - ``guidance`` and ``guidance_rescale`` fp32 ``[batch]``,
    - ``unconditional`` and ``conditional`` int64 ``[batch]``: each sample's two rows; the same twice without guidance.

    The output ``updated_registers`` is like ``registers``. All of this is fp32 at any precision.

    Cases:
        1. The model's input becomes ``input_scale * registers[:, 0]``, in the element type that the model takes.
        2. Guidance extrapolates from the unconditional row (Ho and Salimans 2022, arXiv 2207.12598), and a share
           ``guidance_rescale`` of it is brought back to the conditional row's standard deviation (Lin et al. 2023,
           arXiv 2305.08891, equations 15 and 16).
        3. The update is ``update @ [registers; guided prediction; noise]`` for each sample.

    Args:
        graph: Changed in place; loses the input ``sample`` and the output ``prediction``.
        sample: Name of the latents' input, ``[batch, ...]``.
        prediction: Name of the prediction's output, ``[rows, ...]``.

    Raises:
        ValueError: if there is no such input or output, or its shape is not known.
    """
    latents = next((value for value in graph.inputs if value.name == sample), None)
    output = next((value for value in graph.outputs if value.name == prediction), None)
    if latents is None or latents.shape is None or latents.dtype is None or output is None or output.dtype is None:
        raise ValueError(f"the graph has no input {sample!r} and output {prediction!r} of known types")
    element = list(latents.shape)[1:]
    full = [BATCH, *element]
    builder = Builder(graph, "update")
    registers = builder.input("registers", _FLOAT, [BATCH, REGISTERS, *element])
    noise = builder.input("noise", _FLOAT, full)
    update = builder.input("update", _FLOAT, [BATCH, REGISTERS, TERMS])
    scale, guidance, rescale = (
        builder.input(n, _FLOAT, [BATCH]) for n in ("input_scale", "guidance", "guidance_rescale")
    )
    unconditional, conditional = (
        builder.input(name, ir.DataType.INT64, [BATCH]) for name in ("unconditional", "conditional")
    )
    column = builder.constant([-1, *[1] * len(element)])
    ones = [BATCH, *[1] * len(element)]
    _read_latent(builder, registers, scale, latents)

    result = output
    if output.dtype != _FLOAT:
        result = builder.add("Cast", [result], _FLOAT, output.shape, to=_FLOAT.value)
    first = builder.add("Gather", [result, unconditional], _FLOAT, full, axis=0)
    second = builder.add("Gather", [result, conditional], _FLOAT, full, axis=0)
    weight = builder.add("Reshape", [guidance, column], _FLOAT, ones)
    direction = builder.add("Sub", [second, first], _FLOAT, full)
    guided = builder.add("Add", [first, builder.add("Mul", [weight, direction], _FLOAT, full)], _FLOAT, full)
    share = builder.add("Reshape", [rescale, column], _FLOAT, ones)
    guided = builder.add("Mul", [guided, _contrast(builder, guided, second, share, len(element))], _FLOAT, full)

    axis = builder.constant([1])
    one = [BATCH, 1, *element]
    columns = [builder.add("Unsqueeze", [value, axis], _FLOAT, one) for value in (guided, noise)]
    terms = builder.add("Concat", [registers, *columns], _FLOAT, [BATCH, TERMS, *element], axis=1)
    # Not as a MatMul: OpenVINO computes products in bf16 where that is asked for, and the state that goes from step to
    # step would be rounded every time. What comes after the last product of matrices stays fp32 there.
    lone = [1] * len(element)
    factors = builder.add(
        "Reshape", [update, builder.constant([0, 0, 0, *lone])], _FLOAT, [BATCH, REGISTERS, TERMS, *lone]
    )
    each = builder.add("Unsqueeze", [terms, axis], _FLOAT, [BATCH, 1, TERMS, *element])
    weighted = builder.add("Mul", [factors, each], _FLOAT, [BATCH, REGISTERS, TERMS, *element])
    final = builder.add(
        "ReduceSum", [weighted, builder.constant([2])], _FLOAT, [BATCH, REGISTERS, *element], keepdims=0
    )
    final.name = RESULT
    graph.outputs[list(graph.outputs).index(output)] = final


def read_registers(graph: ir.Graph, *, sample: str) -> None:
    """Case 1 of :func:`fuse_update` alone: for a network that runs beside the denoiser, and sees what it sees.

    Args:
        graph: Changed in place; loses the input ``sample``, and has ``registers`` and ``input_scale`` in its place.
        sample: Name of the latents' input, ``[batch, ...]``.

    Raises:
        ValueError: if there is no such input, or its shape is not known.
    """
    latents = next((value for value in graph.inputs if value.name == sample), None)
    if latents is None or latents.shape is None or latents.dtype is None:
        raise ValueError(f"the graph has no input {sample!r} of known type")
    builder = Builder(graph, "update")
    registers = builder.input("registers", _FLOAT, [BATCH, REGISTERS, *list(latents.shape)[1:]])
    _read_latent(builder, registers, builder.input("input_scale", _FLOAT, [BATCH]), latents)


def _read_latent(builder: Builder, registers: ir.Value, scale: ir.Value, latents: ir.Value) -> None:
    """Put the scaled first register in the place of the input ``latents``."""
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


def _contrast(builder: Builder, guided: ir.Value, conditional: ir.Value, share: ir.Value, rank: int) -> ir.Value:
    """``share * std(conditional) / std(guided) + (1 - share)``, over all dimensions of a sample."""
    axes = builder.constant(list(range(1, rank + 1)))
    ones = [BATCH, *[1] * rank]

    def deviation(value: ir.Value) -> ir.Value:
        mean = builder.add("ReduceMean", [value, axes], _FLOAT, ones, keepdims=1)
        centred = builder.add("Sub", [value, mean], _FLOAT, value.shape)
        square = builder.add("Mul", [centred, centred], _FLOAT, value.shape)
        variance = builder.add("ReduceMean", [square, axes], _FLOAT, ones, keepdims=1)
        return builder.add("Sqrt", [variance], _FLOAT, ones)

    least = builder.constant(1e-12, np.float32)
    below = builder.add("Max", [deviation(guided), least], _FLOAT, ones)
    ratio = builder.add("Div", [deviation(conditional), below], _FLOAT, ones)
    excess = builder.add("Sub", [ratio, builder.constant(1, np.float32)], _FLOAT, ones)
    change = builder.add("Mul", [share, excess], _FLOAT, ones)
    return builder.add("Add", [change, builder.constant(1, np.float32)], _FLOAT, ones)
