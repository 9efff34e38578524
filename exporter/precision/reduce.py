"""Reduced precision: which values of a half-precision graph stay in fp32, and which layers are quantised how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.engines import Array
from latentrt.engines.errors import ExportError, InvalidRequestError
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.families import family_of

from ..graphs.export import EXTERNAL_THRESHOLD, graph_entry
from ..graphs.targets import Form, exported_form
from ..graphs.type_check import check_graph
from ..passes.islands import keep_fp32
from ..passes.quantize import FORMATS, Layer, NumberFormat, find_layers, quantize, quantized_share
from ..passes.smooth import factors, smooth, smoothable
from ..verification.components import psnr
from ..verification.emulate import EmulatedEngine, emulated, widened_copy
from .calibration import Calibration, record
from .observe import Feeds, best_ranges, channel_magnitudes, largest_magnitudes, layer_sqnr

FP16_LIMIT = float(np.finfo(np.float16).max) / 2
"""Largest magnitude that a value of an fp16 graph may reach on known inputs: half of what the type holds."""

_NOISY = 35.0  # dB; above, there is no need to smooth
_LEAST_GAIN = 3.0  # dB; less is not worth an operator more


@dataclass(frozen=True)
class Quantization:
    """How layers are chosen.

    Attributes:
        least_sqnr: Layers whose products keep less signal over quantisation noise than this, in dB, stay as they are.
    """

    least_sqnr: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.least_sqnr <= 200:  # also when it is NaN
            raise InvalidRequestError(f"least SQNR is {self.least_sqnr}, expected 0 to 200 dB (20 is usual)")


@dataclass(frozen=True)
class Quantized:
    """A quantised step.

    Attributes:
        graph: Its entry for the manifest.
        layers: How many layers are quantised.
        smoothed: Of how many of them the channels were smoothed.
        excluded: Layers that are not, with the SQNR in dB that they would have had, worst first.
        share: Share of the layers' weights that is quantised.
        psnr: Of its results against the graph that it was made from, over the recorded calls, in dB.
    """

    graph: Graph
    layers: int
    smoothed: int
    excluded: Mapping[str, float]
    share: float
    psnr: float


def out_of_range(path: Path, feeds: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Values of an fp16 graph that leave :data:`FP16_LIMIT`, with the magnitudes that they reach in fp32.

    Args:
        path: The graph.
        feeds: Inputs, with fp32 in place of fp16.

    Raises:
        EngineError: if the graph cannot be run.
    """
    values = [
        str(value.name)
        for node in ir.load(path).graph
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT16 and value.name
    ]
    if not values:
        return {}
    with widened_copy(path, rounded=False, weights=False) as copy:
        found = largest_magnitudes(copy, values, feeds)
    return {name: largest for name, largest in found.items() if not largest <= FP16_LIMIT}


def keep_in_fp32(path: Path, values: Iterable[str]) -> int:
    """Change a graph in place so that these of its values are fp32, see
    :func:`~latentrt.exporter.passes.islands.keep_fp32`.

    Returns:
        How many of its nodes run in fp32 then.
    """
    model = ir.load(path)
    nodes = keep_fp32(model.graph, set(values))
    ir.save(model, path)  # weights in a file of their own stay there
    check_graph(path, path.parent.name)
    return nodes


def ranges_of_pictures(
    bundle: Bundle, form: Form, calibration: Calibration, *, width: int | None, height: int | None
) -> dict[str, dict[str, float]]:
    """By component the values that leave the range of fp16 while pictures are drawn, see :func:`out_of_range`.

    The encoder is given the pictures that were drawn.
    """
    with emulated(bundle, form.name, rounded=False) as (pipeline, _):
        recording = record(pipeline, calibration, width=width, height=height)
    calls = dict(recording.calls)
    calls["vae_encoder"] = [
        {"sample": picture[None].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)}
        for picture in recording.pictures
    ]
    return {
        name: out_of_range(bundle.graph_path(name, form.name), feeds)
        for name, feeds in calls.items()
        if form.name in bundle.manifest.components[name].graphs
    }


def quantize_step(
    bundle: Bundle,
    form: Form,
    calibration: Calibration,
    quantization: Quantization,
    *,
    width: int | None,
    height: int | None,
) -> Quantized:
    """Quantise the denoiser's step by what it sees while pictures are drawn, and write it beside what it is made from.

    Args:
        bundle: Holds the form that is quantised, see :func:`~latentrt.exporter.graphs.targets.exported_form`.
        form: What to make.
        calibration: What to draw.
        quantization: How to choose layers.
        width: Of the pictures, in pixels; ``None`` is the bundle's default.
        height: Likewise.

    Raises:
        ExportError: if no layer can be quantised.
    """
    base, weights_only = exported_form(form), form.precision == "int8-weights"
    part = family_of(bundle.manifest).stages()[-1]
    number = FORMATS["int8" if weights_only else form.precision]
    with emulated(bundle, base.name, rounded=False) as (pipeline, paths):
        calls = record(pipeline, calibration, width=width, height=height).calls[part]
        layers = find_layers(ir.load(paths[part]).graph)
        ranges = None if weights_only else _ranges(paths[part], layers, number, calls)
        sqnr = layer_sqnr(paths[part], layers, ranges, number, calls)
        smoothed: dict[str, NDArray[np.float32]] = {}
        if ranges is not None:
            smoothed = _smooth_where_it_helps(paths[part], number, calls, ranges, sqnr)
        with EmulatedEngine(paths[part], bundle.graph(part, base.name), part) as engine:
            expected = [engine.run(call)["updated_registers"] for call in calls]
    chosen = [name for name, ratio in sqnr.items() if ratio >= quantization.least_sqnr]
    if not chosen:
        raise ExportError(
            f"{part}: no layer keeps {quantization.least_sqnr:.0f} dB in {form.precision}; take a higher precision"
        )
    source = bundle.graph(part, base.name)
    model = ir.load(bundle.path / source.file)
    share = quantized_share(model.graph, chosen)
    smooth(model.graph, {name: factor for name, factor in smoothed.items() if name in chosen})
    quantize(model.graph, number, ranges, layers=chosen)
    folder, stem = Path(source.file).parent, f"step.{form.name}.onnx"
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{stem}.data" if size > EXTERNAL_THRESHOLD else None
    if external is None:
        ir.external_data.load_to_model(model)
    path = bundle.path / folder / stem
    ir.save(model, path, external_data=external)
    check_graph(path, f"{part} ({form.precision})")
    files = (f"{folder.as_posix()}/{external}",) if external else ()
    graph = graph_entry(model.graph, f"{folder.as_posix()}/{stem}", form, files)
    with widened_copy(path, rounded=True) as copy, EmulatedEngine(copy, graph, part) as engine:
        agreement = min(
            psnr(result, engine.run(call)["updated_registers"]) for call, result in zip(calls, expected, strict=True)
        )
    helped = sum(name in chosen for name in smoothed)
    excluded = {name: ratio for name, ratio in sorted(sqnr.items(), key=lambda item: item[1]) if name not in chosen}
    return Quantized(graph, len(chosen), helped, excluded, share, agreement)


def _ranges(path: Path, layers: Sequence[Layer], number: NumberFormat, calls: Feeds) -> dict[str, float]:
    largest = largest_magnitudes(path, dict.fromkeys(layer.activation for layer in layers), calls)
    # Floating point has finer steps near zero anyway: there nothing is gained by saturating.
    return best_ranges(path, largest, number, calls) if number.name == "int8" else largest


def _smooth_where_it_helps(
    path: Path, number: NumberFormat, calls: Feeds, ranges: dict[str, float], sqnr: dict[str, float]
) -> dict[str, NDArray[np.float32]]:
    """Factors of the noisy layers that gain by smoothing; ``ranges`` and ``sqnr`` are brought up to date for them."""
    model = ir.load(path)
    noisy = [layer for layer in smoothable(model.graph) if sqnr[layer.name] < _NOISY]
    if not noisy:
        return {}
    magnitudes = channel_magnitudes(path, dict.fromkeys(layer.activation for layer in noisy), calls)
    tried = {}
    for layer in noisy:
        constant = model.graph.initializers[layer.weight].const_value
        assert constant is not None
        tried[layer.name] = factors(magnitudes[layer.activation], np.abs(constant.numpy()).max(axis=layer.axis))
    smooth(model.graph, tried)
    copy = path.with_name(f".{path.stem}.smooth.onnx")
    try:
        ir.save(model, copy)  # what stays as it was is read from where it is
        layers = [layer for layer in find_layers(model.graph) if layer.name in tried]
        new_ranges = _ranges(copy, layers, number, calls)
        new_sqnr = layer_sqnr(copy, layers, new_ranges, number, calls)
    finally:
        copy.unlink(missing_ok=True)
    helped = [layer for layer in layers if new_sqnr[layer.name] >= sqnr[layer.name] + _LEAST_GAIN]
    for layer in helped:
        sqnr[layer.name] = new_sqnr[layer.name]
        ranges[layer.activation] = new_ranges[layer.activation]
    return {layer.name: tried[layer.name] for layer in helped}


def describe(quantized: Quantized) -> str:
    """One line about a quantised step."""
    parts = [
        f"{quantized.layers} layers with {quantized.share:.1%} of the weights",
        f"{quantized.psnr:.1f} dB against unquantised",
    ]
    if quantized.smoothed:
        parts.insert(1, f"{quantized.smoothed} smoothed")
    if quantized.excluded:
        name, ratio = next(iter(quantized.excluded.items()))
        shown = "no signal" if math.isinf(ratio) else f"{ratio:.1f} dB"
        parts.insert(1, f"{len(quantized.excluded)} left out (worst: {name}, {shown})")
    return ", ".join(parts)
