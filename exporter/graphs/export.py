"""From a torch module to an ONNX file."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor, nn

from latentrt.engines import TensorSpec
from latentrt.engines.errors import ExportError
from latentrt.runtime.bundle.manifest import Graph

from ..components import Component
from ..passes.borders import float_borders
from .layers import adaptable, name_folded_weights
from .targets import Form
from .type_check import check_graph

EXTERNAL_THRESHOLD = 1_500_000_000
"""Weights above this many bytes go to a file of their own: a protobuf message ends at 2 GiB."""
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""torch's types of the precisions that have half the bits of fp32."""
_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64", "INT32": "int32"}


def cast_inputs(component: Component, inputs: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Inputs in the element type that a graph of ``precision`` takes."""
    dtype, keep = HALVES.get(precision, torch.float32), component.keep_fp32
    return {n: t.to(dtype) if t.is_floating_point() and n not in keep else t for n, t in inputs.items()}


def export_component(component: Component, form: Form, directory: Path) -> Graph:
    """Export one component into ``directory/<name>/``.

    The component's module is left as it is: a graph in half precision is exported from a copy.

    Args:
        component: What to export.
        form: Operator set and precision.
        directory: The bundle under construction.

    Returns:
        The graph's entry for the manifest.

    Raises:
        ExportError: if torch cannot export the module, or the graph is not well typed.
    """
    half = HALVES.get(form.precision)
    module = component.module if half is None else _in_half_precision(component.module, half)
    example = cast_inputs(component, component.example, form.precision)
    try:
        with _quiet(), torch.no_grad():
            # Traced here, without strict mode: the exporter would try named dimensions first, which must hold for
            # every length, fail on guards such as "not divisible by 4", and start over with a slower tracer.
            free = {name: dict.fromkeys(component.dynamic[name], torch.export.Dim.DYNAMIC) for name in example}
            traced = torch.export.export(module, tuple(example.values()), dynamic_shapes=free, strict=False)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=form.opset,
                input_names=list(example),
                output_names=list(component.outputs),
                verbose=False,
            )
    except Exception as error:  # the exporter lets any exception of the traced model through
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ExportError(f"{component.name} could not be exported to ONNX (opset {form.opset}): {reason}") from error
    if program is None:
        raise ExportError(f"{component.name} could not be exported to ONNX: the exporter returned nothing")
    _name_dimensions(program.model, component)
    if adaptable(component):
        name_folded_weights(program.model.graph, module)
    float_borders(program.model.graph)
    with _quiet():  # what cannot be inferred is told by the check below
        # The exporter leaves the shapes inside decomposed operators out.
        ShapeInferencePass(data_prop=True)(program.model)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of this machine are no part of a model
    program.model.metadata_props.clear()
    folder = directory / component.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model{form.suffix}.onnx"
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    # A denoiser's stages use the same weights: in a file of their own they are there once. And of those there others
    # can be put in place when a graph is opened.
    external = f"{path.name}.data" if weights > EXTERNAL_THRESHOLD or adaptable(component) else None
    ir.save(program.model, path, external_data=external)
    check_graph(path, component.name)
    files = (f"{component.name}/{external}",) if external else ()
    return graph_entry(program.model.graph, f"{component.name}/{path.name}", form, files)


def graph_entry(graph: ir.Graph, file: str, form: Form, external: tuple[str, ...]) -> Graph:
    """A graph's entry for the manifest.

    Raises:
        ExportError: if the graph does not give the type of an input or output.
    """
    return Graph(
        file=file,
        precision=form.precision,
        opset=form.opset,
        inputs=tuple(_spec(value) for value in graph.inputs),
        outputs=tuple(_spec(value) for value in graph.outputs),
        external=external,
    )


def _in_half_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in fp16 or bf16. Only the copy's weights take memory: those in fp32 are never there twice."""
    tensors = [*module.parameters(), *module.buffers()]
    half: dict[int, object] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            cast = tensor.detach().to(dtype)
            is_weight = isinstance(tensor, nn.Parameter)
            half[id(tensor)] = nn.Parameter(cast, requires_grad=False) if is_weight else cast
    return copy.deepcopy(module, half)


def _name_dimensions(model: ir.Model, component: Component) -> None:
    """Replace the tracer's symbols (``s53``) by our names in every shape of a graph."""
    names = {}
    for value in model.graph.inputs:
        for axis, name in component.dynamic[value.name or ""].items():
            symbol = value.shape[axis] if value.shape is not None else None
            if not isinstance(symbol, ir.SymbolicDim) or symbol.value is None:
                raise ExportError(f"{component.name}: dimension {axis} of {value.name!r} became fixed while tracing")
            names[str(symbol.value)] = name
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names))
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                ir.SymbolicDim(pattern.sub(lambda match: names[match[0]], str(length.value)))
                if isinstance(length, ir.SymbolicDim) and length.value is not None
                else length
                for length in value.shape
            )


def parameter_count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def _spec(value: ir.Value) -> TensorSpec:
    if value.name is None or value.dtype is None or value.shape is None:
        raise ExportError(f"the exported graph does not give a type to {value.name!r}")
    shape = tuple(
        int(d) if isinstance(d, int) else str(d.value if isinstance(d, ir.SymbolicDim) else d) for d in value.shape
    )
    return TensorSpec(value.name, _DTYPES[value.dtype.name], shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter about itself out of our output."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
