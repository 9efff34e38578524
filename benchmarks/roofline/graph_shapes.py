"""Type and concrete shape of every value in an ONNX graph, from the shapes of its inputs.

An exported graph computes lengths at run time: it splits the shape of a tensor, multiplies lengths and reshapes by the
result. Shape inference of the ``onnx`` package follows such a chain over a node or two only. So this module visits the
nodes in order with concrete shapes: the package's own inference for each operator gets the values of small inputs, and
its reference implementation computes small values that follow from shapes and constants alone. Weights are never read:
their types and shapes are in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.checker import ValidationError
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError, infer_node_outputs

from latentrt.engines.errors import BundleError, InvalidRequestError

_SMALL = 4096  # elements of a value that is computed: shapes, indices and scales of a resize have a few each

# Types in which lengths, indices and scales of a resize are computed.
_COMPUTED = (TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT, TensorProto.DOUBLE)

# The package infers nothing for these; each returns the shape and the type of its first input.
_SAME_AS_INPUT = frozenset({"GroupNormalization"})

_BITS: Mapping[int, int] = {
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((TensorProto.INT2, TensorProto.UINT2), 2),
}


@dataclass(frozen=True)
class Tensor:
    """A value of a graph.

    Attributes:
        dtype: The value's ``TensorProto.DataType``.
        shape: The value's shape.
        constant: Whether it depends on no input of the graph; engines compute such values before the first run.
    """

    dtype: int
    shape: tuple[int, ...]
    constant: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes; elements of fewer than 8 bits are packed."""
        bits = _BITS.get(self.dtype) or 8 * helper.tensor_dtype_to_np_dtype(self.dtype).itemsize
        return (self.elements * bits + 7) // 8

    @property
    def floating(self) -> bool:
        """Whether its numbers are of a floating-point type of 16 bits or more, as those of arithmetic are."""
        return self.dtype in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def read_graph(path: Path) -> ModelProto:
    """Read a graph without the weights that are in other files.

    Raises:
        BundleError: if the file cannot be read or is not an ONNX model.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{path} cannot be read as an ONNX model: {error}") from error


def resolve(model: ModelProto, shapes: Mapping[str, Sequence[int]], label: str) -> dict[str, Tensor]:
    """Type and shape of every value.

    Args:
        model: The model; it is not changed.
        shapes: Shape of every input of the graph, by name.
        label: The graph's name in messages.

    Returns:
        Every input, initializer and output of a node, by name.

    Raises:
        InvalidRequestError: if ``shapes`` does not fit the graph's inputs.
        BundleError: if a node is of no known operator or contains another graph, or if its outputs' shapes do not
            follow from the inputs'.
    """
    return _Walk(model, shapes, label).tensors


class _Walk:
    """A visit to all nodes in order, which collects types, shapes and small values."""

    def __init__(self, model: ModelProto, shapes: Mapping[str, Sequence[int]], label: str) -> None:
        graph = model.graph
        self.label = label
        self.opsets = {each.domain: each.version for each in model.opset_import}
        self.imports = list(model.opset_import)
        self.ir_version = model.ir_version
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, NDArray[Any]] = {}
        for weight in graph.initializer:
            self.tensors[weight.name] = Tensor(weight.data_type, tuple(weight.dims), constant=True)
            if self.tensors[weight.name].elements <= _SMALL and weight.data_location != TensorProto.EXTERNAL:
                self._keep(weight.name, numpy_helper.to_array(weight))
        if graph.sparse_initializer:
            raise BundleError(f"{label} holds sparse weights, whose operations cannot be counted")
        self._add_inputs(graph, shapes)
        for node in graph.node:
            self._visit(node)

    def _add_inputs(self, graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
        inputs = {each.name: each.type.tensor_type for each in graph.input if each.name not in self.tensors}
        if wrong := sorted(inputs.keys() ^ shapes.keys()):
            raise InvalidRequestError(
                f"{self.label} takes {', '.join(inputs) or 'no inputs'}; shapes were given for {', '.join(shapes)}, "
                f"so {wrong[0]!r} is {'missing' if wrong[0] in inputs else 'too much'}"
            )
        symbols: dict[str, int] = {}
        for name, declared in inputs.items():
            shape = tuple(map(int, shapes[name]))
            wanted = [each.dim_value if each.HasField("dim_value") else each.dim_param for each in declared.shape.dim]
            fits = len(shape) == len(wanted) and min(shape, default=1) > 0
            for length, each in zip(shape, wanted, strict=False):
                if each:  # a length without number and name is free
                    fits &= length == (symbols.setdefault(each, length) if isinstance(each, str) else each)
            if not fits:
                known = f" where {symbols}" if symbols else ""
                raise InvalidRequestError(
                    f"{self.label}: the input {name!r} has the shape {wanted}{known}, which {list(shape)} does not fit"
                )
            self.tensors[name] = Tensor(declared.elem_type, shape)

    def _visit(self, node: NodeProto) -> None:
        names = [name for name in node.input if name]
        where = f"{self.label}: {node.op_type} {node.name or (node.output[0] if node.output else '')!r}"
        if any(each.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for each in node.attribute):
            raise BundleError(f"{where} runs another graph inside, whose operations cannot be counted")
        if unknown := [name for name in names if name not in self.tensors]:
            raise BundleError(f"{where} reads {unknown[0]!r}, which nothing before it computes")
        constant = all(self.tensors[name].constant for name in names)
        found = self._infer(node, names, where)
        values = self._compute(node, names, found)
        for name in filter(None, node.output):
            if name in values:
                value = values[name]
                dtype = found[name].dtype if name in found else helper.np_dtype_to_tensor_dtype(value.dtype)
                self.tensors[name] = Tensor(dtype, value.shape, constant)
                self._keep(name, value)
            elif name in found:
                self.tensors[name] = Tensor(found[name].dtype, found[name].shape, constant)
            else:
                raise BundleError(f"{where}: the shape of {name!r} does not follow from the shapes of the inputs")

    def _infer(self, node: NodeProto, names: Sequence[str], where: str) -> dict[str, Tensor]:
        """Outputs whose type and shape the package infers from the inputs'."""
        if node.op_type in _SAME_AS_INPUT and not node.domain:
            return {node.output[0]: self.tensors[node.input[0]]}
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(node.domain, 0), node.domain)
        except onnx.defs.SchemaError as error:
            raise BundleError(f"{where} is of no operator that ONNX defines in {node.domain or 'ai.onnx'}") from error
        types = {
            name: helper.make_tensor_type_proto(self.tensors[name].dtype, self.tensors[name].shape) for name in names
        }
        data = {name: numpy_helper.from_array(self.values[name], name) for name in names if name in self.values}
        try:
            found = infer_node_outputs(
                schema, node, types, data, opset_imports=self.imports, ir_version=self.ir_version
            )
        except (InferenceError, ValidationError) as error:
            raise BundleError(f"{where} does not fit its inputs: {str(error).splitlines()[0]}") from error
        return {name: tensor for name, kind in found.items() if (tensor := _concrete(kind)) is not None}

    def _compute(self, node: NodeProto, names: Sequence[str], found: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        """Values of the outputs, where they are small and follow from shapes and constants."""
        if node.op_type in ("Shape", "Size") and not node.domain:
            shape = np.array(self.tensors[node.input[0]].shape, np.int64)
            if node.op_type == "Size":
                return {node.output[0]: np.array(shape.prod(), np.int64)}
            bounds = {each.name: each.i for each in node.attribute}
            return {node.output[0]: shape[bounds.get("start", 0) : bounds.get("end")]}
        if not all(name in self.values for name in names):
            return {}
        if any(found[name].elements > _SMALL or found[name].dtype not in _COMPUTED for name in found):
            return {}
        outputs = list(filter(None, node.output))
        results = ReferenceEvaluator(node, opsets=self.opsets).run(None, {name: self.values[name] for name in names})
        return dict(zip(outputs, map(np.asarray, results), strict=True))

    def _keep(self, name: str, value: NDArray[Any]) -> None:
        if self.tensors[name].dtype in _COMPUTED and value.size <= _SMALL:
            self.values[name] = value


def _concrete(kind: TypeProto) -> Tensor | None:
    """Type and shape of a value of which all lengths are known; else ``None``."""
    tensor = kind.tensor_type
    if not tensor.HasField("shape") or not all(each.HasField("dim_value") for each in tensor.shape.dim):
        return None
    return Tensor(tensor.elem_type, tuple(each.dim_value for each in tensor.shape.dim))
