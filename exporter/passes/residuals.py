"""Where a ControlNet and a U-Net meet: residuals that one adds up, and the other takes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from .builder import Builder
from .guidance import BATCH, ROWS

SCALE = "control_scale"
"""Input of a ControlNet's step: how much of each residual is added, fp32 ``[rows, residuals]``."""

_FLOAT = ir.DataType.FLOAT


def take_residuals(graph: ir.Graph, shapes: Sequence[tuple[int, str, str]]) -> None:
    """Let a U-Net add residuals to its skip connections and to what its middle computes.

    The new inputs ``residual_0`` and so on have the element type of what they are added to.

    Cases:
        1. A ``Concat`` of two pictures by channels is where a skip connection comes in. The first that comes in is the
           last that left: its residual is the last but one, that of the next the one before, and so on.
        2. What the first of these joins to its skip connection comes from the middle: to it the last one is added.

    Args:
        graph: A U-Net, or its step; changed in place.
        shapes: Of every residual: channels, and the names of height and width.

    Raises:
        ValueError: if the graph has another number of skip connections, or one of other width.
    """
    joins = [node for node in graph if node.op_type == "Concat" and _joins_pictures(node)]
    if len(joins) != len(shapes) - 1:
        raise ValueError(f"the graph has {len(joins)} skip connections, expected {len(shapes) - 1}")
    builder = Builder(graph, "control")
    inside = any(value.name == ROWS for value in graph.inputs)
    places = {number: (join, 1) for number, join in enumerate(reversed(joins))} | {len(joins): (joins[0], 0)}
    for number, (width, height_name, width_name) in enumerate(shapes):
        join, place = places[number]
        value = join.inputs[place]
        assert value is not None
        assert value.shape is not None
        assert value.dtype is not None
        if value.shape[1] != width:
            raise ValueError(f"skip connection {number} has {value.shape[1]} channels, expected {width}")
        shape = [ROWS if inside else BATCH, width, height_name, width_name]
        residual = builder.input(f"residual_{number}", value.dtype, shape)
        builder.before = join
        join.replace_input_with(place, builder.add("Add", [value, residual], value.dtype, value.shape))


def _joins_pictures(node: ir.Node) -> bool:
    ranks = [len(value.shape) if value is not None and value.shape is not None else 0 for value in node.inputs]
    axis = node.attributes.get("axis")
    return ranks == [4, 4] and axis is not None and axis.as_int() in (1, -3)


def chain_residuals(graph: ir.Graph, shapes: Mapping[str, tuple[int, str, str]]) -> None:
    """Add the residuals of a ControlNet's step, times their scales, to those of the ControlNets before it.

    Residual number i becomes ``sum_i + control_scale[:, i] * residual_i``, under its name. ``sum_0`` and so on are
    inputs of its shape and element type.

    Args:
        graph: A ControlNet's step with one row a sample and half; changed in place.
        shapes: Of every output, in order: its name, channels, and the names of height and width.

    Raises:
        ValueError: if the graph has another number of outputs, or one of unknown type.
    """
    if len(graph.outputs) != len(shapes) or any(value.dtype is None for value in graph.outputs):
        raise ValueError(f"the graph has {len(graph.outputs)} outputs, expected {len(shapes)} of known types")
    for value in (value for node in graph for value in node.outputs):
        if value.name in shapes:
            value.name = f"{value.name}_alone"
    builder = Builder(graph, "chain")
    scale = builder.input(SCALE, _FLOAT, [ROWS, len(shapes)])
    column = builder.constant([-1, 1, 1, 1])
    for number, (name, shape) in enumerate(shapes.items()):
        value = graph.outputs[number]
        assert value.dtype is not None
        total = builder.input(f"sum_{number}", value.dtype, [ROWS, *shape])
        own = builder.add("Gather", [scale, builder.constant(number)], _FLOAT, [ROWS], axis=1)
        own = builder.add("Reshape", [own, column], _FLOAT, [ROWS, 1, 1, 1])
        if value.dtype != _FLOAT:
            own = builder.add("Cast", [own], value.dtype, [ROWS, 1, 1, 1], to=value.dtype.value)
        scaled = builder.add("Mul", [value, own], value.dtype, [ROWS, *shape])
        added = builder.add("Add", [total, scaled], value.dtype, [ROWS, *shape])
        added.name = name
        graph.outputs[number] = added
