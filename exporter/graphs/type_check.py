"""Check all element types of a graph as a strongly typed engine does when it reads the graph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, ValueInfoProto

from latentrt.engines.errors import ExportError

_LARGE = 4096  # bytes; constants that shapes are computed from are far smaller
_PLACE = re.compile(r"op_type:\s*(\w+), node name: ([^)]*)\)")
_NAMES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


def check_graph(path: Path, label: str) -> None:
    """Check that a graph is valid, and that every operator takes and gives values of known, fitting types.

    ONNX has no implicit conversions: a graph in which an operator joins half precision and fp32 is not valid, though
    some runtimes read it.

    Steps:
        1. onnx's checker looks at the structure.
        2. onnx's strict inference checks the types of every operator's inputs.
        3. Every value must have a type. The result of an operator that onnx does not know has none, and whatever uses
           it would go unchecked.

    Args:
        path: The ONNX file; weights in a file beside it are not read.
        label: Name of the graph in messages.

    Raises:
        ExportError: with the first operator that does not fit, and the types of its inputs.
    """
    # Step 1.
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # onnx has several exception classes with no common base
        raise ExportError(f"{label}: the exported graph is not valid: {_first_line(error)}") from error
    # Step 2.
    model = _without_weights(path)
    try:
        typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # the same holds here
        raise ExportError(f"{label}: the exported graph is not well typed: {_explain(model, error)}") from error
    # Step 3.
    known = set(_types(typed))
    for node in typed.graph.node:
        for name in node.output:
            if name and name not in known:
                raise ExportError(
                    f"{label}: the exported graph is not well typed: the type of {name!r}, an output of {node.op_type} "
                    f"{node.name!r}, is unknown"
                )


def _without_weights(path: Path) -> onnx.ModelProto:
    """Load a graph with the values of small constants only; a large one keeps its type and shape."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _LARGE:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="left out")
    return model


def _explain(model: onnx.ModelProto, error: Exception) -> str:
    """Return onnx's message, with the types of the operator's inputs if the message names an operator."""
    reason = _first_line(error)
    if place := _PLACE.search(reason):
        kind, name = place.groups()
        types = _types(onnx.shape_inference.infer_shapes(model))
        for node in model.graph.node:
            if (node.op_type, node.name) == (kind, name):
                inputs = ", ".join(f"{types.get(each, 'untyped')} {each!r}" for each in node.input if each)
                return f"{kind} {name!r} takes {inputs} ({reason[place.end() :].strip(' :')})"
    return reason


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Return the name of each value's element type, by the value's name."""
    found = {tensor.name: _name(tensor.data_type) for tensor in model.graph.initializer}
    for value in _values(model):
        if kind := value.type.tensor_type.elem_type:
            found[value.name] = _name(kind)
    return found


def _values(model: onnx.ModelProto) -> Iterator[ValueInfoProto]:
    yield from model.graph.input
    yield from model.graph.value_info
    yield from model.graph.output


def _name(kind: int) -> str:
    return _NAMES.get(kind) or str(TensorProto.DataType.Name(kind)).lower()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
