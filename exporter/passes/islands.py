"""Keep parts of a half-precision graph in fp32, where values leave the range of fp16."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from .builder import Builder
from .widen import HALVES

_FLOAT = ir.DataType.FLOAT


def keep_fp32(graph: ir.Graph, values: Collection[str]) -> int:
    """Compute the named values of a half-precision graph in fp32, and let everything that uses them use fp32.

    The largest magnitude of fp16 is 65504; a graph in fp16 turns what exceeds it into infinity. Only the nodes that
    compute or use such a value change, so the rest of the graph stays as fast as it was.

    Steps, for every node that computes or uses one of ``values``:
        1. Its half-precision constants become fp32, and an attribute that names half precision as the type of its
           output names fp32; a ``Cast`` to half precision becomes a ``Cast`` to fp32.
        2. Inputs that are still of half precision pass through a ``Cast`` to fp32, made once for each value. A ``Cast``
           node takes any type, so its input stays.
        3. Its outputs become fp32. Those that are not named pass through a ``Cast`` back to the type that they had;
           those that are named stay fp32 for all users, as outputs of the graph too.

    Args:
        graph: Changed in place. Its nodes have no subgraphs.
        values: Names of values that nodes compute. One that is not of half precision has no effect.

    Returns:
        The number of nodes that now run in fp32.

    Raises:
        ValueError: if no node computes a value of that name.
    """
    computed = {str(value.name): value for node in graph for value in node.outputs}
    if unknown := sorted(set(values) - computed.keys()):
        raise ValueError(f"no node of the graph computes {unknown[0]!r}")
    large = {computed[name] for name in values if computed[name].dtype in HALVES}
    builder, nodes = Builder(graph, "island"), list(graph)
    island = [node for node in nodes if large & {*node.outputs, *(v for v in node.inputs if v is not None)}]
    following = dict(zip(nodes, [*nodes[1:], None], strict=True))
    widened: dict[ir.Value, ir.Value] = {}
    for node in island:
        # Step 1.
        _widen_attributes(node)

        # Step 2: a value in ``large`` is fp32 already, or becomes fp32 when its own node comes up.
        builder.before = node
        if node.op_type != "Cast":
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype not in HALVES or value in large:
                    continue
                if value not in widened:
                    widened[value] = builder.add("Cast", [value], _FLOAT, value.shape, to=_FLOAT.value)
                node.replace_input_with(index, widened[value])

        # Step 3: casts back stand right behind the node.
        builder.before = following[node]
        for value in node.outputs:
            if (half := value.dtype) not in HALVES:
                continue
            if value not in large:
                builder.cast_for_users(value, half, suffix="_fp32")
            value.dtype = _FLOAT
    return len(island)


def _widen_attributes(node: ir.Node) -> None:
    for attribute in list(node.attributes.values()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
            array = attribute.as_tensor().numpy().astype("float32")
            node.attributes.add(ir.AttrTensor(attribute.name, ir.Tensor(array)))
        elif attribute.name in ("to", "dtype") and ir.DataType(attribute.as_int()) in HALVES:
            node.attributes.add(ir.AttrInt64(attribute.name, _FLOAT.value))
