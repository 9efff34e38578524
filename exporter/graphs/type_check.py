"""Types of everything in a graph, checked as a strongly typed engine checks them when it reads the graph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, ValueInfoProto

from latentrt.engines.errors import ExportError

_LARGE = 4096  # bytes; what a shape is computed from is far smaller
_PLACE = re.compile(r"op_type:\s*(\w+), node name: ([^)]*)\)")
_NAMES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


def check_graph(path: Path, label: str) -> None:
    """Check a graph's structure, that the types of every operator's inputs fit, and that every value has a type.

    ONNX converts nothing by itself: what joins half precision and fp32 is no valid graph, though some runtimes read it.

    Args:
        path: The file; weights beside it are not read.
        label: What messages call it.

    Raises:
        ExportError: naming the first operator that does not fit, with the types of its inputs.
    """
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # onnx has several exception classes with no common base
        raise ExportError(f"{label}: the exported graph is not valid: {_first_line(error)}") from error
    model = _without_weights(path)
    try:
        typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # likewise
        raise ExportError(f"{label}: the exported graph is not well typed: {_told(model, error)}") from error
    known = set(_types(typed))
    for node in typed.graph.node:
        for name in node.output:
            if name and name not in known:
                raise ExportError(
                    f"{label}: the exported graph is not well typed: nothing says what {node.op_type} "
                    f"{node.name!r} gives as {name!r}"
                )


def _without_weights(path: Path) -> onnx.ModelProto:
    """The graph with the values of small tensors alone; a large one keeps its type and shape."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _LARGE:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="left out")
    return model


def _told(model: onnx.ModelProto, error: Exception) -> str:
    """What is wrong, with the operator's inputs where it can be found."""
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
    """Names of the element types of all values."""
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
