"""A bundle under construction: graphs are exported, kept in range, quantised, and held to their gates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from latentrt.runtime.bundle.manifest import STAGES, Graph
from latentrt.runtime.bundle.reader import Bundle

from ..components import Adapter, Component
from ..graphs.export import HALVES, cast_inputs, export_component, parameter_count
from ..graphs.layers import record_layers
from ..graphs.stages import export_stages
from ..graphs.targets import Form, exported_form
from ..model import Model
from ..precision.calibration import Calibration
from ..precision.quality import compare_engine, require
from ..precision.reduce import Quantization, describe, keep_in_fp32, out_of_range, quantize_step, ranges_of_pictures
from ..progress import Reporter
from ..verification.bundle import graph_psnr, stages_psnr
from ..verification.components import heavy_weight

Size = Mapping[str, int | None]
"""``width`` and ``height`` in pixels; ``None`` is the bundle's default."""


def picture_key(engine: str, precision: str) -> str:
    """Key of a manifest's ``quality`` for the PSNR in dB of images that an engine draws in a reduced precision."""
    return f"pictures/{engine}/{precision}/psnr_db"


def loaded_as(model: Model, precisions: Collection[str], verify: bool) -> Model:
    """A model whose weights take no more memory than an export needs.

    They are loaded in fp32 if graphs are compared with torch, or are not all of one half precision.

    Args:
        model: The model.
        precisions: Precisions of the graphs to export.
        verify: Whether they are compared with torch.
    """
    only = next(iter(precisions)) if len(set(precisions)) == 1 else "fp32"
    return model if verify else dataclasses.replace(model, dtype=HALVES.get(only, torch.float32))


@dataclass
class Construction:
    """Graphs of a bundle that is being written, and figures of their quality.

    Attributes:
        model: The model that they are exported from.
        directory: Where their files are.
        verify: Compare them with torch.
        reporter: Receives the progress.
        graphs: By component and form.
        quality: Figures for the manifest, see :class:`latentrt.runtime.bundle.manifest.Manifest`.
        preview: Opens the bundle with the graphs that it has so far.
        exported: Graphs that are new, relative to the bundle.
    """

    model: Model
    directory: Path
    verify: bool
    reporter: Reporter
    graphs: dict[str, dict[str, Graph]]
    quality: dict[str, float]
    preview: Callable[[], Bundle]
    exported: list[str] = field(default_factory=list)

    def export(self, name: str, forms: Sequence[Form]) -> None:
        """Export a component, and its stages if it is a denoiser or a ControlNet.

        Raises:
            ExportError: if torch cannot export it, or it cannot be split.
            VerificationError: if a graph does not compute what its source computes.
        """
        if not forms:
            return
        component = loaded_as(self.model, [form.precision for form in forms], self.verify).load_component(name)
        record_layers(component, self.directory)
        for form in forms:
            self._export_whole(component, form)
            if component.roles:
                self._export_stages(component, form)

    def _export_whole(self, component: Component, form: Form) -> None:
        """Export a component's whole graph; what leaves the range of fp16 stays fp32."""
        name = component.name
        self.reporter.stage(f"{name}: ONNX, opset {form.opset}, {form.precision}")
        start = time.perf_counter()
        made, notes = form, []
        if form.precision == "fp16" and (weight := heavy_weight(component)):
            made = Form(form.opset, "fp32")
            notes.append(f"kept in fp32, since {weight} leaves the range of fp16")
        graph = export_component(component, made, self.directory)
        if graph.precision == "fp16":
            example = {n: t.numpy() for n, t in cast_inputs(component, component.example, "fp32").items()}
            if large := out_of_range(self.directory / graph.file, [example]):
                nodes = keep_in_fp32(self.directory / graph.file, large)
                notes.append(f"{nodes} operators kept in fp32, where values reach {max(large.values()):.0f}")
        size = sum((self.directory / file).stat().st_size for file in (graph.file, *graph.external))
        parts = [f"{parameter_count(component.module) / 1e6:.1f} M parameters", f"{size / 1e6:.1f} MB"]
        if self.verify:
            self.quality[graph.file] = graph_psnr(component, graph, self.directory)
            parts.append(f"{self.quality[graph.file]:.1f} dB against torch")
        self.graphs[name][form.name] = graph  # under the form that was asked for; the graph says what it is
        self.exported.append(graph.file)
        self.reporter.result("; ".join([f"{', '.join(parts)}, {time.perf_counter() - start:.1f} s", *notes]))

    def _export_stages(self, component: Component, form: Form) -> None:
        """Make the stages of an exported component."""
        self.reporter.stage(f"{component.name}: stages of the loop")
        start = time.perf_counter()
        stages = self._split(component, form)
        parts = [f"{len(stage.outputs)} tensors from {part}" for part, stage in stages.items()][:-1]
        if self.verify:
            parts.append(f"{self.quality[next(iter(stages.values())).file]:.1f} dB against torch")
        self.exported += [stage.file for stage in stages.values()]
        self.reporter.result(f"{', '.join(parts)}, {time.perf_counter() - start:.1f} s")

    def _split(self, component: Component, form: Form) -> dict[str, Graph]:
        """Split a component into its stages, and make the denoiser's twins of them."""
        whole = self.graphs[component.name][form.name]
        stages = export_stages(component, whole, Form(form.opset, whole.precision), self.directory)
        for part, stage in stages.items():
            self.graphs[part][form.name] = stage
        if self.verify:
            psnr = stages_psnr(component, stages, self.directory)
            self.quality |= {stage.file: psnr for stage in stages.values()}
        if component.name == self.model.family.denoiser:
            for adapter in self.model.adapters:
                self._derive(adapter, whole, stages, form.name)
        return stages

    def _derive(self, adapter: Adapter, whole: Graph, stages: Mapping[str, Graph], form: str) -> None:
        """Make the twins that an adapter gives the denoiser."""
        denoiser, step = self.model.family.denoiser, self.model.family.stages()[-1]
        derived = adapter.derive(whole, stages[step], self.directory)
        for part, graph in derived.items():
            self.graphs[part][form] = graph
        self.exported += [graph.file for graph in derived.values() if graph.file not in self.exported]
        for twin in adapter.twins if self.verify else ():
            component, last = self.model.load_component(twin), f"{twin}_{STAGES[-1]}"
            self.quality[derived[twin].file] = graph_psnr(component, derived[twin], self.directory)
            others = {part.replace(denoiser, twin, 1): each for part, each in stages.items() if part != step}
            self.quality[derived[last].file] = stages_psnr(component, {**others, last: derived[last]}, self.directory)

    def widen_where_needed(self, form: Form, calibration: Calibration, size: Size) -> None:
        """Keep in fp32 what leaves the range of fp16 while images are drawn; a denoiser is then split again.

        Raises:
            EngineError: if the graphs cannot be run.
            VerificationError: if a graph does not compute what its source computes.
        """
        self.reporter.stage(f"{form.precision}, opset {form.opset}: ranges over {len(calibration.prompts)} images")
        found = ranges_of_pictures(self.preview(), form, calibration, **size)
        notes = []
        for name in self.model.components:
            parts = [found.get(part, {}) for part in self.model.with_stages(name)]
            values = {value: reached for part in parts for value, reached in part.items()}
            if not values:
                continue
            graph, component = self.graphs[name][form.name], self.model.load_component(name)
            nodes = keep_in_fp32(self.directory / graph.file, values)
            notes.append(f"{nodes} operators of {name} kept in fp32, where values reach {max(values.values()):.0f}")
            if self.verify:
                self.quality[graph.file] = graph_psnr(component, graph, self.directory)
            if component.roles:
                self._split(component, form)
        self.reporter.result("; ".join(notes) or "all values stay within half of what fp16 holds")

    def quantize(self, form: Form, calibration: Calibration, quantization: Quantization, size: Size) -> None:
        """Quantise the denoiser's step; every other component serves the new form as it is.

        Raises:
            ExportError: if no layer can be quantised.
            EngineError: if the graphs cannot be run.
        """
        base, family = exported_form(form), self.model.family
        step = family.stages()[-1]
        self.reporter.stage(f"{step}: {form.precision}, opset {form.opset}, the rest {base.precision}")
        start = time.perf_counter()
        quantized = quantize_step(self.preview(), form, calibration, quantization, **size)
        for part, graphs in self.graphs.items():
            if part != family.denoiser and base.name in graphs:  # a whole denoiser is not quantised
                graphs[form.name] = graphs[base.name]
        self.graphs[step][form.name] = quantized.graph
        self.quality[quantized.graph.file] = round(min(quantized.psnr, 999.0), 2)
        self.exported.append(quantized.graph.file)
        self.reporter.result(f"{describe(quantized)}, {time.perf_counter() - start:.1f} s")

    def judge(self, engine: str, precision: str, calibration: Calibration, size: Size, *, accept: bool) -> None:
        """Compare images of a reduced precision with those of fp32.

        Args:
            engine: The engine that draws them.
            precision: The precision that it computes in.
            calibration: The prompts.
            size: Size of the images.
            accept: Take them even if they are below the gate.

        Raises:
            VerificationError: if they are below the gate, and that is not accepted.
        """
        self.reporter.stage(f"{engine}, {precision}: images against fp32")
        start = time.perf_counter()
        judged = compare_engine(self.preview(), engine, precision, calibration, **size)
        if not accept:
            require(judged.pictures, precision, engine)
        prefix = picture_key(engine, precision).removesuffix("psnr_db")
        self.quality[f"{prefix}psnr_db"] = round(judged.pictures.psnr, 2)
        self.quality[f"{prefix}worst_db"] = round(judged.pictures.worst, 2)
        self.quality[f"{prefix}ssim"] = round(judged.pictures.ssim, 4)
        self.reporter.result(f"{judged}, {time.perf_counter() - start:.1f} s")

    def drop(self, form: Form) -> None:
        """Remove a form again, with those files that no other form uses."""
        dropped = [graphs.pop(form.name) for graphs in self.graphs.values() if form.name in graphs]
        kept = [graph for graphs in self.graphs.values() for graph in graphs.values()]
        used = {file for graph in kept for file in (graph.file, *graph.external)}
        for file in {file for graph in dropped for file in (graph.file, *graph.external)} - used:
            (self.directory / file).unlink()
            self.quality.pop(file, None)
            if file in self.exported:
                self.exported.remove(file)
