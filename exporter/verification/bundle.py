"""Compare the graphs of a bundle with torch, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from latentrt.engines.errors import BundleError
from latentrt.runtime.bundle.manifest import STAGES, Graph
from latentrt.runtime.bundle.reader import Bundle

from ..components import Component
from ..graphs.targets import QUANTIZED
from ..model import Model
from ..progress import Reporter, Silent
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


def verify_bundle(bundle: Bundle, model: Model, reporter: Reporter | None = None) -> dict[str, float]:
    """Compare every graph of a bundle with the model that it should come from. Nothing is written to the bundle.

    Args:
        bundle: The bundle.
        model: The model, with the adapters that the bundle was built with.
        reporter: Receives the progress; ``None`` reports to nobody.

    Returns:
        PSNR in dB by the graph's file.

    Raises:
        BundleError: if the bundle comes from another source, or from other adapters.
        VerificationError: if a graph falls below the gate of its precision.
    """
    if bundle.manifest.source.fingerprint != model.fingerprint:
        raise BundleError(f"{bundle.path.name} was not built from {model.name}: the fingerprints of the weights differ")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="latentrt-verify-") as scratch:
        verification = _Verification(bundle, model, reporter or Silent(), Path(scratch), figures)
        for name in (*model.components, *model.twins):
            if name in bundle.manifest.components:
                verification.verify(name)
    return figures


@dataclass(frozen=True)
class _Verification:
    """A bundle that is being compared.

    Attributes:
        bundle: The bundle.
        model: The model that it comes from.
        reporter: Receives the progress.
        scratch: Folder for copies of graphs.
        figures: PSNR in dB of the graphs that were compared.
    """

    bundle: Bundle
    model: Model
    reporter: Reporter
    scratch: Path
    figures: dict[str, float]

    def verify(self, name: str) -> None:
        """Compare a component's graphs, and its stages in each form that has them."""
        component, components = self.model.load_component(name), self.bundle.manifest.components
        for form, graph in components[name].graphs.items():
            if graph.file in self.figures:
                continue  # serves several forms
            self.reporter.stage(f"{name}: {form}")
            self.bundle.graph_path(name, form)  # looks into the graph before ONNX Runtime opens it
            self.figures[graph.file] = graph_psnr(component, graph, self.bundle.path, self.scratch)
            self.reporter.result(f"{self.figures[graph.file]:.1f} dB")
        last = f"{name}_{STAGES[-1]}"
        for form in components[last].graphs if last in components else ():
            self._verify_stages(component, name, form)

    def _verify_stages(self, component: Component, name: str, form: str) -> None:
        """Compare a guided step through the stages with torch."""
        components, denoiser = self.bundle.manifest.components, self.model.family.denoiser
        last, twin = f"{name}_{STAGES[-1]}", name in self.model.twins
        # A twin has a last stage of its own, and otherwise the denoiser's stages.
        parts = {f"{name}_{s}": f"{denoiser if twin and s != STAGES[-1] else name}_{s}" for s in STAGES}
        parts = {as_: part for as_, part in parts.items() if part in components and form in components[part].graphs}
        stages = {as_: components[part].graphs[form] for as_, part in parts.items()}
        self.reporter.stage(f"{name}: {form}, stages of the loop")
        for part in parts.values():
            self.bundle.graph_path(part, form)
        psnr = stages_psnr(component, stages, self.bundle.path, self.scratch)
        shared = twin or stages[last].precision in QUANTIZED  # the other stages have figures already
        self.figures.update({stages[part].file: psnr for part in ([last] if shared else stages)})
        self.reporter.result(f"{psnr:.1f} dB")
