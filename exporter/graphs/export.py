"""Export a torch module to an ONNX file."""

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
"""Size of weights in bytes above which they go into a file of their own: a protobuf message ends at 2 GiB."""
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""torch's element types of half precision, by the name of the precision."""
_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64", "INT32": "int32"}


def cast_inputs(component: Component, inputs: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Convert inputs to the element types that a graph of ``precision`` takes; ``component.keep_fp32`` stays fp32."""
    dtype, keep = HALVES.get(precision, torch.float32), component.keep_fp32
    return {n: t.to(dtype) if t.is_floating_point() and n not in keep else t for n, t in inputs.items()}


def export_component(component: Component, form: Form, directory: Path) -> Graph:
    """Export one component to ``directory/<name>/model<suffix>.onnx``.

    The component's module stays unchanged: a graph in half precision is exported from a copy.

    Steps:
        1. torch traces the module and writes an ONNX graph, see :func:`_traced`.
        2. Dimensions get the component's names, and constants that a LoRA may change get their layers' names.
        3. bf16 inputs and outputs become fp32 (:func:`~latentrt.exporter.passes.borders.float_borders`).
        4. Shapes are inferred where the exporter left them out, and metadata is removed.
        5. The graph is written, with its weights inside or in a file beside it.
        6. The file is checked as a strongly typed engine checks it.

    Args:
        component: The component to export.
        form: Operator set and precision.
        directory: The bundle under construction.

    Returns:
        The graph's entry for the manifest.

    Raises:
        ExportError: if torch cannot export the module, or the graph is not well typed.
    """
    half = HALVES.get(form.precision)
    module = component.module if half is None else _in_half_precision(component.module, half)
    model = _traced(component, module, form)  # step 1
    # Step 2.
    _name_dimensions(model, component)
    if adaptable(component):
        name_folded_weights(model.graph, module)
    float_borders(model.graph)  # step 3
    # Step 4: the exporter leaves out the shapes inside decomposed operators.
    with _quiet():  # the check below reports shapes and types that cannot be inferred
        ShapeInferencePass(data_prop=True)(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of this machine are no part of a model
    model.metadata_props.clear()
    # Step 5.
    folder = directory / component.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model{form.suffix}.onnx"
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    # A denoiser's stages use the same weights: in a file of their own these are stored once. A LoRA's weights can
    # replace those in a file when a graph is opened.
    external = f"{path.name}.data" if weights > EXTERNAL_THRESHOLD or adaptable(component) else None
    ir.save(model, path, external_data=external)
    check_graph(path, component.name)  # step 6
    files = (f"{component.name}/{external}",) if external else ()
    return graph_entry(model.graph, f"{component.name}/{path.name}", form, files)


def _traced(component: Component, module: nn.Module, form: Form) -> ir.Model:
    """Return the ONNX model that torch's exporter makes of a component's module, or of its copy in half precision."""
    example = cast_inputs(component, component.example, form.precision)
    try:
        with _quiet(), torch.no_grad():
            # Traced here, without strict mode. The exporter itself would try named dimensions first, which must hold
            # for every length; they fail on guards such as "not divisible by 4", and it would start over with a slower
            # tracer.
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
    return program.model


def graph_entry(graph: ir.Graph, file: str, form: Form, external: tuple[str, ...]) -> Graph:
    """Make a graph's entry for the manifest.

    Args:
        graph: The graph.
        file: Path of its file within the bundle.
        form: Operator set and precision.
        external: Paths, within the bundle, of the files that hold its weights.

    Raises:
        ExportError: if the element type or shape of an input or output is unknown.
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
    """Copy a module in fp16 or bf16; the copy takes memory for its own weights alone, none in fp32."""
    # deepcopy takes what its memo holds for a copy that it has made already.
    tensors = [*module.parameters(), *module.buffers()]
    half: dict[int, object] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            cast = tensor.detach().to(dtype)
            is_weight = isinstance(tensor, nn.Parameter)
            half[id(tensor)] = nn.Parameter(cast, requires_grad=False) if is_weight else cast
    return copy.deepcopy(module, half)


def _name_dimensions(model: ir.Model, component: Component) -> None:
    """Replace the tracer's symbols (``s53``) in every shape of a graph by the component's names of dimensions.

    Raises:
        ExportError: if the tracer fixed a dimension that should vary.
    """
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
    """Return the number of a module's parameters."""
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
    """Silence warnings and log messages of torch's exporter."""
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
