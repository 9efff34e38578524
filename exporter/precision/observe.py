"""Measure values of a graph on real inputs.

The measuring operators are added to a copy of the graph, so that a few numbers leave a run and no whole activations.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.engines import Array
from latentrt.engines.errors import translated
from latentrt.engines.onnxrt import load_sdk

from ..passes.builder import Builder
from ..passes.quantize import Layer, NumberFormat, representable, weight_scales

Feeds = Sequence[Mapping[str, Array]]
"""Inputs of a graph, one entry for each call."""

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the largest magnitude that :func:`best_ranges` tries as the range of an activation."""

_FLOAT = ir.DataType.FLOAT
_ERRORS_ONLY = 3


def largest_magnitudes(path: Path, values: Iterable[str], feeds: Feeds) -> dict[str, float]:
    """Measure the largest magnitude of each value over all calls.

    Args:
        path: An ONNX file whose floating-point values are fp32.
        values: Names of values; inputs of the graph are allowed.
        feeds: Inputs of the calls.

    Raises:
        EngineError: if the graph cannot be run.
    """
    with _extended(path) as (graph, builder):
        known, behind, names = _values(graph), _following(graph), {}
        for name in values:
            builder.before = behind[known[name]]
            names[name] = _reduce(builder, "ReduceMax", builder.add("Abs", [known[name]], _FLOAT))
        outputs = _outputs(graph, names)
    found = dict.fromkeys(names, 0.0)
    for results in _run(path, outputs, feeds):
        found = {name: max(found[name], float(results[name])) for name in found}
    return found


def channel_magnitudes(path: Path, values: Iterable[str], feeds: Feeds) -> dict[str, NDArray[np.float32]]:
    """Measure the largest magnitude of each channel (last axis) of each value over all calls.

    Args:
        path: An ONNX file whose floating-point values are fp32.
        values: Names of values whose rank is known.
        feeds: Inputs of the calls.

    Returns:
        Magnitudes, ``[channels]``, by value.

    Raises:
        EngineError: if the graph cannot be run.
    """
    with _extended(path) as (graph, builder):
        known, behind, wanted = _values(graph), _following(graph), {}
        for name in values:
            builder.before = behind[known[name]]
            shape = known[name].shape
            assert shape is not None
            axes = builder.constant(list(range(len(shape) - 1)))
            magnitudes = builder.add("Abs", [known[name]], _FLOAT)
            wanted[name] = builder.add("ReduceMax", [magnitudes, axes], _FLOAT, [shape[-1]], keepdims=0)
        outputs = _outputs(graph, wanted)
    found: dict[str, NDArray[np.float32]] = {}
    for results in _run(path, outputs, feeds):
        found = {name: np.maximum(found.get(name, 0), values) for name, values in results.items()}
    return found


def best_ranges(path: Path, largest: Mapping[str, float], number: NumberFormat, feeds: Feeds) -> dict[str, float]:
    """Find the range of each activation that rounds it with the least squared error over all calls.

    Values beyond the range saturate. If only a few values are large, the finer steps of a smaller range gain more than
    these few lose.

    Args:
        path: An ONNX file whose floating-point values are fp32.
        largest: Largest magnitude of each activation, see :func:`largest_magnitudes`.
        number: Format to round to.
        feeds: Inputs of the calls.

    Returns:
        For each activation one of :data:`CLIPS` times its largest magnitude.

    Raises:
        EngineError: if the graph cannot be run.
    """
    with _extended(path) as (graph, builder):
        known, behind = _values(graph), _following(graph)
        errors: dict[str, ir.Value] = {}
        for name, magnitude in largest.items():
            builder.before = behind[known[name]]
            for place, clip in enumerate(CLIPS):
                rounded = _rounded(builder, known[name], clip * magnitude / number.largest, number)
                errors[f"{name}:{place}"] = _squares(builder, builder.add("Sub", [known[name], rounded], _FLOAT))
        outputs = _outputs(graph, errors)
    totals = {name: np.zeros(len(CLIPS)) for name in largest}
    for results in _run(path, outputs, feeds):
        for name, total in totals.items():
            total += [results[f"{name}:{place}"] for place in range(len(CLIPS))]
    return {name: CLIPS[int(total.argmin())] * largest[name] for name, total in totals.items()}


def layer_sqnr(
    path: Path, layers: Sequence[Layer], ranges: Mapping[str, float] | None, number: NumberFormat, feeds: Feeds
) -> dict[str, float]:
    """Measure how much noise quantisation alone adds to each layer's products over all calls.

    Steps:
        1. Each layer gets a twin, with rounded inputs and weights; the other layers stay exact.
        2. Over all calls, the squares of the exact products (signal) and of the differences to the twin's (noise) are
           summed.
        3. The ratio of the two sums is the layer's SQNR.

    Args:
        path: An ONNX file whose floating-point values are fp32.
        layers: Layers to measure, from :func:`~latentrt.exporter.passes.quantize.find_layers`.
        ranges: Range of each activation; ``None`` rounds the weights alone.
        number: Format to round to.
        feeds: Inputs of the calls.

    Returns:
        Signal-to-quantisation-noise ratio in dB, by the layer's name.

    Raises:
        EngineError: if the graph cannot be run.
    """
    with _extended(path) as (graph, builder):
        nodes, behind = {node.name: node for node in graph}, _following(graph)
        wanted: dict[str, ir.Value] = {}
        for layer in layers:
            node = nodes[layer.name]
            builder.before = behind[node.outputs[0]]
            scale = None if ranges is None else ranges[layer.activation] / number.largest
            twin = _quantized_twin(builder, node, layer, scale, number)
            signal = node.outputs[0]
            noise = builder.add("Sub", [signal, twin], _FLOAT)
            wanted[f"{layer.name}:signal"] = _squares(builder, signal)
            wanted[f"{layer.name}:noise"] = _squares(builder, noise)
        outputs = _outputs(graph, wanted)
    totals = dict.fromkeys(wanted, 0.0)
    for results in _run(path, outputs, feeds):
        totals = {name: total + float(results[name]) for name, total in totals.items()}
    return {layer.name: _decibels(totals[f"{layer.name}:signal"], totals[f"{layer.name}:noise"]) for layer in layers}


def _quantized_twin(
    builder: Builder, node: ir.Node, layer: Layer, scale: float | None, number: NumberFormat
) -> ir.Value:
    """Add a copy of a layer with rounded weights, and with a rounded activation if that has a scale."""
    activation, weight = node.inputs[0], node.inputs[1]
    assert activation is not None
    assert weight is not None
    assert weight.const_value is not None
    rounded = activation if scale is None else _rounded(builder, activation, scale, number)
    scales = weight_scales(weight.const_value.numpy(), layer.axis, number, _FLOAT)
    coarse = _rounded(builder, weight, scales, number, axis=layer.axis)
    twin = ir.Node("", node.op_type, [rounded, coarse, *node.inputs[2:]], node.attributes.values())
    builder.insert(twin)
    twin.outputs[0].name = f"twin_{layer.name}"
    return twin.outputs[0]


def _decibels(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


@contextlib.contextmanager
def _extended(path: Path) -> Iterator[tuple[ir.Graph, Builder]]:
    """Yield a copy of a graph to add to, and write it beside the graph, where its weights are found."""
    model = ir.load(path)
    yield model.graph, Builder(model.graph, "observe")
    ir.save(model, _beside(path))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.observed.onnx")


def _run(path: Path, outputs: Mapping[str, str], feeds: Feeds) -> Iterator[dict[str, Any]]:
    """Yield the results of each call, by the names in ``outputs``, and remove the copy of the graph afterwards."""
    ort = load_sdk()
    settings = ort.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    # In the order of the file: each value is measured right after it is computed, and its memory is free again.
    settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    settings.enable_cpu_mem_arena = False
    # ONNX Runtime's optimisations for quantised graphs would remove or fuse the roundings that are measured here, and
    # folded constants would be a second copy of the weights.
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        with translated(f"{path.name} could not be observed"):
            session = ort.InferenceSession(
                str(_beside(path)),
                settings,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"],
            )
            for each in feeds:
                yield dict(zip(outputs, session.run(list(outputs.values()), dict(each)), strict=True))
    finally:
        _beside(path).unlink(missing_ok=True)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    found = {str(value.name): value for value in graph.inputs}
    return found | {str(value.name): value for node in graph for value in node.outputs}


def _following(graph: ir.Graph) -> dict[ir.Value, ir.Node | None]:
    """Return, for each value, the node behind the one that computes it; ``None`` at the end of the graph."""
    nodes = list(graph)
    found: dict[ir.Value, ir.Node | None] = dict.fromkeys(graph.inputs, nodes[0] if nodes else None)
    for node, behind in zip(nodes, [*nodes[1:], None], strict=True):
        found |= dict.fromkeys(node.outputs, behind)
    return found


def _outputs(graph: ir.Graph, values: Mapping[str, ir.Value]) -> dict[str, str]:
    """Make these values the only outputs of a graph, and return their names."""
    graph.outputs.clear()
    graph.outputs.extend(values.values())
    return {name: str(value.name) for name, value in values.items()}


def _reduce(builder: Builder, operator: str, value: ir.Value) -> ir.Value:
    return builder.add(operator, [value], _FLOAT, [], keepdims=0)


def _squares(builder: Builder, value: ir.Value) -> ir.Value:
    return _reduce(builder, "ReduceSumSquare", value)


def _rounded(builder: Builder, value: ir.Value, scale: Any, number: NumberFormat, axis: int | None = None) -> ir.Value:
    """Add the rounding of a value to a format and back; ``axis`` is that of the scales, if there are several."""
    scale = representable(np.asarray(scale, np.float32), _FLOAT)
    parameters = [builder.tensor(scale, _FLOAT), builder.tensor(np.zeros(scale.shape), number.dtype)]
    along = 1 if axis is None else axis  # has no effect if the scale is a single number
    stored = builder.add("QuantizeLinear", [value, *parameters], number.dtype, axis=along)
    return builder.add("DequantizeLinear", [stored, *parameters], _FLOAT, axis=along)
