"""Keep parts of a graph of half precision in fp32, where its numbers leave the range of fp16."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from .builder import Builder
from .widen import HALVES

_FLOAT = ir.DataType.FLOAT


def keep_fp32(graph: ir.Graph, values: Collection[str]) -> int:
    """Compute some values of a graph of half precision in fp32, and let all who take them take them so.

    Cases:
        1. A node that computes or takes one of ``values`` runs in fp32; what it takes passes through ``Cast``.
        2. Of its outputs those that are named stay fp32; the others pass through ``Cast`` back to what they were.
        3. A ``Cast`` to half precision that computes a named value becomes one to fp32.
        4. A graph output that is named becomes fp32.

    Args:
        graph: Changed in place. Its nodes have no subgraphs.
        values: Names of values.

    Returns:
        How many nodes run in fp32 now.

    Raises:
        ValueError: if a name is that of an input, or of no value.
    """
    made = {str(value.name): value for node in graph for value in node.outputs}
    if unknown := sorted(set(values) - made.keys()):
        raise ValueError(f"no node of the graph computes {unknown[0]!r}")
    large = {made[name] for name in values if made[name].dtype in HALVES}
    builder, nodes = Builder(graph, "island"), list(graph)
    inside = [node for node in nodes if large & {*node.outputs, *(v for v in node.inputs if v is not None)}]
    following = dict(zip(nodes, [*nodes[1:], None], strict=True))
    widened: dict[ir.Value, ir.Value] = {}
    for node in inside:
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
                array = attribute.as_tensor().numpy().astype("float32")
                node.attributes.add(ir.AttrTensor(attribute.name, ir.Tensor(array)))
            elif attribute.name in ("to", "dtype") and ir.DataType(attribute.as_int()) in HALVES:
                node.attributes.add(ir.AttrInt64(attribute.name, _FLOAT.value))
        builder.before = node
        if node.op_type != "Cast":
            for place, value in enumerate(node.inputs):
                if value is None or value.dtype not in HALVES or value in large:
                    continue
                if value not in widened:
                    widened[value] = builder.add("Cast", [value], _FLOAT, value.shape, to=_FLOAT.value)
                node.replace_input_with(place, widened[value])
        builder.before = following[node]
        for value in node.outputs:
            half = value.dtype
            if half not in HALVES:
                continue
            if value not in large:
                users = [(use.node, use.idx) for use in value.uses()]
                places = [place for place, output in enumerate(graph.outputs) if output is value]
                back = builder.add("Cast", [value], half, value.shape, to=half.value)
                for user, place in users:
                    user.replace_input_with(place, back)
                for place in places:
                    value.name, back.name = f"{value.name}_fp32", value.name
                    graph.outputs[place] = back
            value.dtype = _FLOAT
    return len(inside)
