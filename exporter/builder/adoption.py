"""Taking over directories of ONNX graphs that Optimum exported: they are copied, and have no stages."""

from __future__ import annotations

import dataclasses
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from latentrt.engines import TensorSpec
from latentrt.engines.errors import BundleError, EngineError, InvalidRequestError, LatentRTError, SourceError
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.runtime.bundle.manifest import Component, Graph
from latentrt.runtime.bundle.onnx_guard import external_tensors
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.bundle.writer import write_bundle

from ..progress import Reporter
from ..source.optimum import MODEL, GraphFolders
from ..source.source import Source
from .manifest import ManifestFactory, write_tokenizers

_DTYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
}
_PRECISIONS = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
}
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", re.ASCII)
_TOKENS, _LATENTS = 77, 4  # lengths that the trial of a graph takes where the graph leaves them open

WARNING = (
    "graphs are taken over as they were exported, without stages: the loop is plain, and nothing is shared between "
    "steps or halves of guidance; build from the model's weights for those"
)


@dataclass
class _Adopted:
    """Graphs that were copied, and versions of the tools that made them."""

    graphs: dict[str, Graph] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)


def adopt(
    factory: ManifestFactory,
    folders: GraphFolders,
    output: Path,
    *,
    precision: str,
    try_out: bool,
    reporter: Reporter,
) -> tuple[Bundle, tuple[str, ...]]:
    """Make a bundle of a directory of graphs.

    Args:
        factory: Describes the directory, with the versions of what takes part here.
        folders: Where its graphs are.
        output: The bundle; one that is there is kept if it is of the same graphs, and else replaced.
        precision: The precision that the graphs must have.
        try_out: Run every graph once.
        reporter: Receives the progress.

    Returns:
        The bundle, and which graphs are new in it.

    Raises:
        InvalidRequestError: if the graphs are of another precision.
        SourceError: if a graph is damaged or hostile, or is not what its folder says.
        OutputError: if the bundle cannot be written.
    """
    source = factory.model.source
    reporter.stage(source.name)
    reporter.result(WARNING)
    if (older := _same_graphs(factory, output)) is not None:
        reporter.stage("ONNX graphs")
        reporter.result("already taken over from this source")
        return older, ()
    with write_bundle(output) as writer:
        adopted = _Adopted()
        for name in folders.components:
            _copy(folders, name, writer.directory, adopted)
        tokenizers = write_tokenizers(source, writer.directory)
        # One name for all: a pipeline asks for one precision, and the graph says what it is itself.
        if (found := adopted.graphs[source.family.denoiser].precision) != precision:
            raise InvalidRequestError(
                f"the graphs of {source.name} are {found}, and are taken over as they are; give --precision {found}"
            )
        components = {
            name: Component(name, {f"opset{graph.opset}-{precision}": graph}) for name, graph in adopted.graphs.items()
        }
        factory = dataclasses.replace(factory, tools={**adopted.tools, **factory.tools})
        manifest = factory.make(components, tokenizers)
        preview = writer.preview(manifest)
        for name, component in components.items():
            ((form, graph),) = component.graphs.items()
            reporter.stage(f"{name}: ONNX of its own, opset {graph.opset}, {graph.precision}")
            _check_names(source, folders, name, graph)
            path = preview.graph_path(name, form)  # looks into the graph before anything opens it
            if try_out:
                _try(source, name, graph, path)
            reporter.result("runs" if try_out else "taken over")
        writer.commit(manifest)
    return Bundle.open(output), tuple(graph.file for graph in adopted.graphs.values())


def _same_graphs(factory: ManifestFactory, output: Path) -> Bundle | None:
    """The bundle at the output, if it was made of these very graphs with these very tools and is whole."""
    try:
        older = Bundle.open(output, verify_hash=True)
    except (BundleError, OSError):
        return None
    same_tools = dict(factory.tools).items() <= dict(older.manifest.tools).items()
    return older if same_tools and factory.describes(older.manifest) else None


def _copy(folders: GraphFolders, name: str, directory: Path, adopted: _Adopted) -> None:
    """Copy one component's graph with its files of weights."""
    folder, label = folders.path / name, f"{name}/{MODEL}"
    try:
        tensors = external_tensors(folder / MODEL)
    except BundleError as error:
        raise SourceError(str(error)) from error
    external = sorted({tensor.location for tensor in tensors})
    for location in external:
        if Path(location).name != location or not (folder / location).is_file():
            raise SourceError(f"{label} has weights in {location!r}, which is no file beside it")
    (directory / name).mkdir()
    for file in (MODEL, *external):
        shutil.copyfile(folder / file, directory / name / file)
    try:
        model = onnx.load(folder / MODEL, load_external_data=False)
    except Exception as error:  # protobuf's exceptions have no common base
        raise SourceError(f"{label} is no ONNX model") from error
    stored = {weight.name for weight in model.graph.initializer}
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)
    if not 1 <= opset <= 100:
        raise SourceError(f"{label} has the operator set {opset}, expected one of ONNX's own")
    adopted.graphs[name] = Graph(
        file=label,
        precision=_precision(model),
        opset=opset,
        inputs=tuple(_spec(value, label) for value in model.graph.input if value.name not in stored),
        outputs=tuple(_spec(value, label) for value in model.graph.output),
        external=tuple(f"{name}/{location}" for location in external),
    )
    for tool, version in ((model.producer_name, model.producer_version), *folders.tools):
        if _VERSION.fullmatch(tool) and _VERSION.fullmatch(version):
            adopted.tools[tool] = version


def _precision(model: Any) -> str:
    """The precision of most of the weights."""
    sizes: dict[str, int] = {}
    for weight in model.graph.initializer:
        if weight.data_type in _PRECISIONS:
            kind = _PRECISIONS[weight.data_type]
            sizes[kind] = sizes.get(kind, 0) + int(np.prod(weight.dims, dtype=np.float64))
    return max(sizes, key=lambda kind: sizes[kind], default="fp32")


def _spec(value: Any, label: str) -> TensorSpec:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DTYPES:
        raise SourceError(f"{label}: {value.name!r} has an element type that no graph of a diffusion model has")
    lengths = (
        dim.dim_value if dim.dim_value > 0 else dim.dim_param[:100] or f"{value.name}_{axis}"
        for axis, dim in enumerate(tensor.shape.dim)
    )
    return TensorSpec(value.name, _DTYPES[tensor.elem_type], tuple(lengths))


def _check_names(source: Source, folders: GraphFolders, name: str, graph: Graph) -> None:
    """Inputs and outputs are those of Optimum's exports, and lengths are free where requests differ."""
    inputs, outputs = folders.components[name]
    label = f"{name}/{MODEL} of {source.name}"
    found = {spec.name: spec for spec in graph.inputs}
    if set(found) != set(inputs):
        raise SourceError(f"{label} takes {', '.join(found) or 'nothing'}, expected {', '.join(inputs)}")
    if missing := [each for each in outputs if each not in {spec.name for spec in graph.outputs}]:
        raise SourceError(f"{label} does not give {missing[0]!r}; export it again with output_hidden_states=True")
    for spec in found.values():
        free = (0, 2, 3) if len(spec.shape) == 4 else (0,)
        if spec.name != "timestep" and any(
            isinstance(spec.shape[axis], int) for axis in free if axis < len(spec.shape)
        ):
            raise SourceError(f"{label} takes one size alone, {spec}; export it again with dynamic axes")


def _try(source: Source, name: str, graph: Graph, path: Path) -> None:
    """Run a graph once on zeros, at a small size."""
    lengths = {"input_ids": (1, _TOKENS), "encoder_hidden_states": (2, _TOKENS)}
    unet = source.configs[source.family.denoiser]
    side = _LATENTS * 2 ** len(unet["block_out_channels"])
    feeds = {}
    for spec in graph.inputs:
        default = lengths.get(spec.name, (2 if name == source.family.denoiser else 1, 1, side, side))
        shape = [length if isinstance(length, int) else default[axis] for axis, length in enumerate(spec.shape)]
        feeds[spec.name] = np.zeros(shape, spec.dtype)
    try:
        engine = OnnxRuntimeEngine(path, label=f"{name} of {source.name}")
        engine.loose_outputs = True  # whoever exported the graph may have declared the lengths of outputs wrongly
        with engine:
            results = engine.run(feeds)
    except EngineError as error:
        raise SourceError(f"{name}/{MODEL} of {source.name} does not run: {error}") from error
    except LatentRTError as error:
        raise SourceError(f"{name}/{MODEL} of {source.name} is not what its folder says: {error}") from error
    for output, values in results.items():
        if not np.isfinite(np.asarray(values, np.float32)).all():
            raise SourceError(f"{name}/{MODEL} of {source.name} computes NaN or infinity for {output!r}")
