"""Join ControlNets and a U-Net: each ControlNet adds its residuals to a sum, and the U-Net adds the sum to its values.

The residuals of a ControlNet (Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv
2302.05543) are added to the skip connections and the middle of the U-Net.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from .builder import Builder
from .guidance import BATCH, ROWS

SCALE = "control_scale"
"""Input of a ControlNet's step: the factor of each residual, fp32 ``[rows, residuals]``."""

_FLOAT = ir.DataType.FLOAT


def take_residuals(graph: ir.Graph, shapes: Sequence[tuple[int, str, str]]) -> None:
    """Let a U-Net add residuals to its skip connections and to the output of its middle block.

    The new inputs ``residual_0``, ``residual_1`` and so on have the element type of the value that they are added to.

    Cases:
        1. A ``Concat`` of two values of rank 4 by channels is where a skip connection joins the decoder. Skip
           connections are a stack: the first that joins is the last that left. The joins in reverse order therefore
           take the residuals 0, 1 and so on.
        2. The other input of the first join comes from the middle block; the last residual is added to it.
        3. Any other ``Concat`` stays.

    Args:
        graph: A U-Net, or its step; changed in place.
        shapes: Of every residual: channels, and the names of height and width.

    Raises:
        ValueError: if the graph has another number of skip connections, or one of another width.
    """
    # Case 3 falls out here.
    joins = [node for node in graph if node.op_type == "Concat" and _joins_channels(node)]
    if len(joins) != len(shapes) - 1:
        raise ValueError(f"the graph has {len(joins)} skip connections, expected {len(shapes) - 1}")
    builder = Builder(graph, "control")
    # After guidance is shared, what meets the prompt has a row for each half of a sample.
    leading = ROWS if any(value.name == ROWS for value in graph.inputs) else BATCH
    # Cases 1 and 2: the node, and which of its inputs, that each residual goes to.
    places = {number: (join, 1) for number, join in enumerate(reversed(joins))} | {len(joins): (joins[0], 0)}
    for number, (channels, height, width) in enumerate(shapes):
        join, index = places[number]
        value = join.inputs[index]
        assert value is not None
        assert value.shape is not None
        assert value.dtype is not None
        if value.shape[1] != channels:
            raise ValueError(f"skip connection {number} has {value.shape[1]} channels, expected {channels}")
        residual = builder.input(f"residual_{number}", value.dtype, [leading, channels, height, width])
        builder.before = join
        join.replace_input_with(index, builder.add("Add", [value, residual], value.dtype, value.shape))


def _joins_channels(node: ir.Node) -> bool:
    ranks = [len(value.shape) if value is not None and value.shape is not None else 0 for value in node.inputs]
    axis = node.attributes.get("axis")
    return ranks == [4, 4] and axis is not None and axis.as_int() in (1, -3)


def chain_residuals(graph: ir.Graph, shapes: Mapping[str, tuple[int, str, str]]) -> None:
    """Add a ControlNet's residuals, times their scales, to the sums of the ControlNets that ran before it.

    Output number i becomes ``sum_i + control_scale[:, i] * residual_i``, and keeps its name. The new inputs ``sum_0``,
    ``sum_1`` and so on have the shape and element type of the outputs; the first ControlNet of a chain gets zeros.

    Steps:
        1. The residuals are renamed to ``<name>_alone``, so that the sums can take their names.
        2. The new input ``control_scale`` is declared.
        3. Each residual is multiplied with its column of ``control_scale``, in its own element type.
        4. The product is added to the new input ``sum_<i>``, and the result takes the residual's place and name.

    Args:
        graph: A ControlNet's step with one row for each half of each sample; changed in place.
        shapes: Of every output, in order: its name, channels, and the names of height and width.

    Raises:
        ValueError: if the graph has another number of outputs, or one of unknown type.
    """
    if len(graph.outputs) != len(shapes) or any(value.dtype is None for value in graph.outputs):
        raise ValueError(f"the graph has {len(graph.outputs)} outputs, expected {len(shapes)} of known types")
    # Step 1.
    for value in (value for node in graph for value in node.outputs):
        if value.name in shapes:
            value.name = f"{value.name}_alone"
    # Step 2.
    builder = Builder(graph, "chain")
    scale = builder.input(SCALE, _FLOAT, [ROWS, len(shapes)])
    column = builder.constant([-1, 1, 1, 1])
    for number, (name, shape) in enumerate(shapes.items()):
        value = graph.outputs[number]
        assert value.dtype is not None
        total = builder.input(f"sum_{number}", value.dtype, [ROWS, *shape])
        # Step 3.
        own = builder.add("Gather", [scale, builder.constant(number)], _FLOAT, [ROWS], axis=1)
        own = builder.add("Reshape", [own, column], _FLOAT, [ROWS, 1, 1, 1])
        if value.dtype != _FLOAT:
            own = builder.add("Cast", [own], value.dtype, [ROWS, 1, 1, 1], to=value.dtype.value)
        scaled = builder.add("Mul", [value, own], value.dtype, [ROWS, *shape])
        # Step 4.
        added = builder.add("Add", [total, scaled], value.dtype, [ROWS, *shape])
        added.name = name
        graph.outputs[number] = added
