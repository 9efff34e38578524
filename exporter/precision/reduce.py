"""Decide which values of a half-precision graph stay in fp32, and which layers are quantised and how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.engines import Array
from latentrt.engines.checks import check_number
from latentrt.engines.errors import ExportError
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.families import family_of

from ..graphs.export import EXTERNAL_THRESHOLD, graph_entry
from ..graphs.targets import Form, exported_form
from ..graphs.type_check import check_graph
from ..passes.islands import keep_fp32
from ..passes.quantize import FORMATS, Layer, NumberFormat, find_layers, quantize, quantized_share
from ..passes.smooth import factors, smooth, smoothable
from ..passes.update import RESULT
from ..verification.components import psnr
from ..verification.emulate import EmulatedEngine, emulated, widened_copy
from .calibration import Calibration, record
from .observe import Feeds, best_ranges, channel_magnitudes, largest_magnitudes, layer_sqnr

FP16_LIMIT = float(np.finfo(np.float16).max) / 2
"""Largest magnitude that a value of an fp16 graph may reach on known inputs: half of the largest fp16 number, since
other inputs may lead further."""

_NOISY = 35.0  # dB; layers with a higher SQNR need no smoothing
_LEAST_GAIN = 3.0  # dB; a smaller gain is not worth another operator


@dataclass(frozen=True)
class Quantization:
    """Settings for the choice of layers.

    Attributes:
        least_sqnr: Least signal-to-quantisation-noise ratio of a layer's products, 0 to 200 dB; layers below it are
            not quantised.

    Raises:
        InvalidRequestError: if ``least_sqnr`` is not in that range.
    """

    least_sqnr: float = 20.0

    def __post_init__(self) -> None:
        check_number("least SQNR", self.least_sqnr, 0, 200, hint=" dB (20 is usual)")


@dataclass(frozen=True)
class Quantized:
    """A quantised step.

    Attributes:
        graph: Its entry for the manifest.
        layers: Number of quantised layers.
        smoothed: Number of those whose activations were smoothed.
        excluded: Layers that are not quantised, with the SQNR in dB that they would have, worst first.
        share: Quantised share, 0 to 1, of the weights of all layers.
        psnr: Lowest PSNR in dB, over the recorded calls, of its results against those of the graph that it was made
            from.
    """

    graph: Graph
    layers: int
    smoothed: int
    excluded: Mapping[str, float]
    share: float
    psnr: float


def out_of_range(path: Path, feeds: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Find the values of an fp16 graph that exceed :data:`FP16_LIMIT`, with the magnitudes that they reach in fp32.

    Args:
        path: The graph's file.
        feeds: Inputs of the calls, with fp32 in place of fp16.

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
    """Apply :func:`~latentrt.exporter.passes.islands.keep_fp32` to a graph's file.

    Args:
        path: The file; it is replaced.
        values: Names of the values that become fp32.

    Returns:
        The number of nodes that now run in fp32.

    Raises:
        ExportError: if the changed graph is not well typed.
        ValueError: if no node computes a value of that name.
    """
    model = ir.load(path)
    nodes = keep_fp32(model.graph, set(values))
    ir.save(model, path)  # weights in a file of their own stay there
    check_graph(path, path.parent.name)
    return nodes


def ranges_of_pictures(
    bundle: Bundle, form: Form, calibration: Calibration, *, width: int | None, height: int | None
) -> dict[str, dict[str, float]]:
    """Find the values of each component that exceed fp16's range while images are drawn, see :func:`out_of_range`.

    The VAE's encoder gets the images that were drawn.

    Args:
        bundle: The bundle.
        form: An fp16 form; components without it are left out.
        calibration: Prompts and steps.
        width: Width of the images in pixels; ``None`` takes the bundle's default.
        height: Height of the images in pixels; ``None`` takes the bundle's default.

    Returns:
        Magnitudes by the value's name, by component.
    """
    with emulated(bundle, form.name, rounded=False) as (pipeline, _):
        recording = record(pipeline, calibration, width=width, height=height)
    calls = dict(recording.calls)
    calls["vae_encoder"] = [
        {"sample": image[None].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)}
        for image in recording.images
    ]
    return {
        name: out_of_range(bundle.graph_path(name, form.name), feeds)
        for name, feeds in calls.items()
        if form.name in bundle.manifest.components[name].graphs
    }


@dataclass(frozen=True)
class _Observed:
    """A step's behaviour on recorded calls, see :func:`_observe`.

    Attributes:
        calls: Inputs of the calls.
        expected: The exact result of each call.
        ranges: Range of each activation; ``None`` if only weights are quantised.
        sqnr: SQNR in dB of each layer.
        smoothed: Factors of the layers that gain by smoothing.
    """

    calls: Feeds
    expected: Sequence[Array]
    ranges: Mapping[str, float] | None
    sqnr: Mapping[str, float]
    smoothed: Mapping[str, NDArray[np.float32]]


def quantize_step(
    bundle: Bundle,
    form: Form,
    calibration: Calibration,
    quantization: Quantization,
    *,
    width: int | None,
    height: int | None,
) -> Quantized:
    """Quantise the denoiser's step by its inputs while images are drawn, and write it beside the graph it is made from.

    Steps:
        1. Images are drawn, and ranges, noise and smoothing factors of each layer are found, see :func:`_observe`.
        2. Layers with an SQNR of at least ``least_sqnr`` are chosen.
        3. They are smoothed where that helps, and quantised.
        4. The graph is written and checked.
        5. It runs on the recorded calls with all its roundings, and is compared with the exact results.

    Args:
        bundle: Holds the form that is quantised, see :func:`~latentrt.exporter.graphs.targets.exported_form`.
        form: The quantised form to make.
        calibration: Prompts, steps, and the number of calls to record.
        quantization: Settings for the choice of layers.
        width: Width of the images in pixels; ``None`` takes the bundle's default.
        height: Height of the images in pixels; ``None`` takes the bundle's default.

    Raises:
        ExportError: if no layer can be quantised.
    """
    part = family_of(bundle.manifest).stages()[-1]
    number = FORMATS["int8" if form.precision == "int8-weights" else form.precision]
    seen = _observe(bundle, part, form, number, calibration, {"width": width, "height": height})  # step 1
    # Step 2.
    chosen = [name for name, ratio in seen.sqnr.items() if ratio >= quantization.least_sqnr]
    if not chosen:
        raise ExportError(
            f"{part}: no layer keeps {quantization.least_sqnr:.0f} dB in {form.precision}; take a higher precision"
        )
    # Step 3.
    source = bundle.graph(part, exported_form(form).name)
    model = ir.load(bundle.path / source.file)
    share = quantized_share(model.graph, chosen)
    smooth(model.graph, {name: factor for name, factor in seen.smoothed.items() if name in chosen})
    quantize(model.graph, number, seen.ranges, layers=chosen)
    # Step 4.
    path = (bundle.path / source.file).with_name(f"step.{form.name}.onnx")
    graph = _write(model, path, bundle.path, form)
    check_graph(path, f"{part} ({form.precision})")
    # Step 5.
    with widened_copy(path, rounded=True) as copy, EmulatedEngine(copy, graph, part) as engine:
        agreement = min(
            psnr(result, engine.run(call)[RESULT]) for call, result in zip(seen.calls, seen.expected, strict=True)
        )
    helped = sum(name in chosen for name in seen.smoothed)
    worst_first = sorted(seen.sqnr.items(), key=lambda item: item[1])
    excluded = {name: ratio for name, ratio in worst_first if name not in chosen}
    return Quantized(graph, len(chosen), helped, excluded, share, agreement)


def _observe(
    bundle: Bundle,
    part: str,
    form: Form,
    number: NumberFormat,
    calibration: Calibration,
    size: Mapping[str, int | None],
) -> _Observed:
    """Draw images with the exact form in fp32, and measure the step's layers on the recorded calls."""
    base = exported_form(form)
    with emulated(bundle, base.name, rounded=False) as (pipeline, paths):
        calls = record(pipeline, calibration, width=size["width"], height=size["height"]).calls[part]
        layers = find_layers(ir.load(paths[part]).graph)
        ranges = None if form.precision == "int8-weights" else _ranges(paths[part], layers, number, calls)
        sqnr = layer_sqnr(paths[part], layers, ranges, number, calls)
        smoothed: dict[str, NDArray[np.float32]] = {}
        if ranges is not None:
            smoothed = _smooth_where_it_helps(paths[part], number, calls, ranges, sqnr)
        with EmulatedEngine(paths[part], bundle.graph(part, base.name), part) as engine:
            expected = [engine.run(call)[RESULT] for call in calls]
    return _Observed(calls, expected, ranges, sqnr, smoothed)


def _write(model: ir.Model, path: Path, root: Path, form: Form) -> Graph:
    """Write a quantised graph, with its weights inside or in a file beside it, and return its entry."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{path.name}.data" if size > EXTERNAL_THRESHOLD else None
    if external is None:
        ir.external_data.load_to_model(model)
    ir.save(model, path, external_data=external)
    files = (path.with_name(external).relative_to(root).as_posix(),) if external else ()
    return graph_entry(model.graph, path.relative_to(root).as_posix(), form, files)


def _ranges(path: Path, layers: Sequence[Layer], number: NumberFormat, calls: Feeds) -> dict[str, float]:
    largest = largest_magnitudes(path, dict.fromkeys(layer.activation for layer in layers), calls)
    # The steps of floating point are finer near zero anyway, so saturating large values gains nothing.
    return best_ranges(path, largest, number, calls) if number.name == "int8" else largest


def _smooth_where_it_helps(
    path: Path, number: NumberFormat, calls: Feeds, ranges: dict[str, float], sqnr: dict[str, float]
) -> dict[str, NDArray[np.float32]]:
    """Return the factors of the noisy layers that gain by smoothing, and update ``ranges`` and ``sqnr`` for these.

    Steps:
        1. Layers below :data:`_NOISY` that can be smoothed get factors from their channels' magnitudes.
        2. A copy of the graph is smoothed, and measured as the graph was.
        3. Layers that gain at least :data:`_LEAST_GAIN` keep their factors.
    """
    # Step 1.
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
    # Step 2.
    smooth(model.graph, tried)
    copy = path.with_name(f".{path.stem}.smooth.onnx")
    try:
        ir.save(model, copy)  # weights that did not change are read from the graph's own file
        layers = [layer for layer in find_layers(model.graph) if layer.name in tried]
        new_ranges = _ranges(copy, layers, number, calls)
        new_sqnr = layer_sqnr(copy, layers, new_ranges, number, calls)
    finally:
        copy.unlink(missing_ok=True)
    # Step 3.
    helped = [layer for layer in layers if new_sqnr[layer.name] >= sqnr[layer.name] + _LEAST_GAIN]
    for layer in helped:
        sqnr[layer.name] = new_sqnr[layer.name]
        ranges[layer.activation] = new_ranges[layer.activation]
    return {layer.name: tried[layer.name] for layer in helped}


def describe(quantized: Quantized) -> str:
    """Describe a quantised step in one line."""
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
