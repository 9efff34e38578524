"""Compare the graphs of a bundle with torch, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from latentrt.engines.errors import BundleError
from latentrt.runtime.bundle.manifest import STAGES, Graph, controlled
from latentrt.runtime.bundle.reader import Bundle

from ..adapters.controlled import controlled_component
from ..components import Component
from ..graphs.targets import QUANTIZED
from ..model import load_component
from ..progress import Reporter, Silent
from ..source.source import Source
from .components import check_component, check_stages
from .emulate import EmulatedEngine, widened_copy

_MOST = 999.0  # dB; stands for the infinite PSNR of equal arrays, which JSON cannot write


def graph_psnr(component: Component, graph: Graph, directory: Path, scratch: Path | None = None) -> float:
    """Compute the PSNR in dB of a graph's outputs against torch, at most 999.

    A graph in half precision is emulated in fp32 with all its roundings.

    Args:
        component: The component that it was exported from.
        graph: Its entry in the manifest.
        directory: The bundle.
        scratch: Folder for a temporary copy of the graph; ``None`` puts it beside the graph.

    Raises:
        VerificationError: if the PSNR is below the gate of the graph's precision.
        EngineError: if the graph cannot be run.
    """
    with (
        widened_copy(directory / graph.file, rounded=True, scratch=scratch) as copy,
        EmulatedEngine(copy, graph, component.name) as engine,
    ):
        return round(min(check_component(component, engine, graph.precision).psnr, _MOST), 2)


def stages_psnr(
    component: Component, stages: Mapping[str, Graph], directory: Path, scratch: Path | None = None
) -> float:
    """Compute the PSNR in dB of a guided step through a denoiser's stages against torch, at most 999.

    Stages in half precision are emulated in fp32 with all their roundings.

    Args:
        component: The denoiser that they were exported from.
        stages: Their entries in the manifest, by name, such as ``unet_step``.
        directory: The bundle.
        scratch: Folder for temporary copies of the graphs; ``None`` puts them beside the graphs.

    Raises:
        VerificationError: if the PSNR is below the gate of the step's precision.
        EngineError: if a graph cannot be run.
    """
    with ExitStack() as stack:
        engines = {}
        for part, stage in stages.items():
            copy = stack.enter_context(widened_copy(directory / stage.file, rounded=True, scratch=scratch))
            engines[part] = stack.enter_context(EmulatedEngine(copy, stage, part))
        precision = stages[f"{component.name}_step"].precision
        return round(min(check_stages(component, engines, precision).psnr, _MOST), 2)


def verify_bundle(bundle: Bundle, source: Source, reporter: Reporter | None = None) -> dict[str, float]:
    """Compare every graph of a bundle with the source that it should come from; the bundle stays unchanged.

    Args:
        bundle: The bundle.
        source: The source, with the adapters that the bundle was built with.
        reporter: Receives each graph's name and PSNR; ``None`` reports nothing.

    Returns:
        PSNR in dB by the graph's file.

    Raises:
        BundleError: if the bundle comes from another source.
        VerificationError: if a graph falls below the gate of its precision.
    """
    reporter = reporter or Silent()
    if bundle.manifest.source.fingerprint != source.fingerprint:
        raise BundleError(
            f"{bundle.path.name} was not built from {source.name}: the fingerprints of the weights differ"
        )
    figures: dict[str, float] = {}
    components = bundle.manifest.components
    with tempfile.TemporaryDirectory(prefix="latentrt-verify-") as scratch:
        denoiser = source.family.denoiser
        for name in (*source.components, controlled(denoiser)):
            if name not in components:
                continue
            twin = name not in source.components
            component = controlled_component(source) if twin else load_component(source, name)
            for form, graph in components[name].graphs.items():
                if graph.file in figures:
                    continue  # one graph may serve several forms
                reporter.stage(f"{name}: {form}")
                bundle.graph_path(name, form)  # checks the graph before ONNX Runtime opens it
                figures[graph.file] = graph_psnr(component, graph, bundle.path, Path(scratch))
                reporter.result(f"{figures[graph.file]:.1f} dB")
            for form in components[f"{name}_step"].graphs if f"{name}_step" in components else ():
                # A twin for ControlNets has a step of its own, and shares the denoiser's other stages.
                parts = {f"{name}_{s}": f"{denoiser if twin and s != STAGES[-1] else name}_{s}" for s in STAGES}
                parts = {as_: part for as_, part in parts.items() if part in components}
                stages = {as_: c.graphs[form] for as_, p in parts.items() if form in (c := components[p]).graphs}
                precision = stages[f"{name}_step"].precision
                reporter.stage(f"{name}: {form}, stages of the loop")
                for part in stages:
                    bundle.graph_path(parts[part], form)
                psnr = stages_psnr(component, stages, bundle.path, Path(scratch))
                new = [f"{name}_step"] if twin or precision in QUANTIZED else stages
                figures |= {stages[part].file: psnr for part in new}
                reporter.result(f"{psnr:.1f} dB")
    return figures
