"""The denoiser's twin that takes a ControlNet's residuals in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from latentrt.engines.errors import ExportError
from latentrt.engines.trt import Range
from latentrt.runtime.bundle.manifest import STAGES, Graph, controlled

from ..components import Component
from ..graphs.export import graph_entry
from ..graphs.type_check import check_graph
from ..model import load_component
from ..passes.borders import float_borders
from ..passes.residuals import take_residuals
from .controlnet import residual_shapes

if TYPE_CHECKING:
    from ..graphs.targets import Form
    from ..source.source import Source


class Controlled(nn.Module):
    """A denoiser that is given residuals behind its own inputs; for comparing, it is not exported itself.

    Args:
        denoiser: The denoiser's module, as it is exported.
        inputs: How many inputs that has.
        residuals: How many residuals follow.
    """

    def __init__(self, denoiser: nn.Module, inputs: int, residuals: int) -> None:
        super().__init__()
        self.denoiser: Any = denoiser
        self.inputs, self.residuals = inputs, residuals

    def forward(self, *values: Tensor) -> Tensor:
        """Predict."""
        given = values[self.inputs :]
        forward = self.denoiser.unet.forward

        def with_residuals(*arguments: Any, **options: Any) -> Any:
            residuals = {"down_block_additional_residuals": given[:-1], "mid_block_additional_residual": given[-1]}
            return forward(*arguments, **options, **residuals)

        self.denoiser.unet.forward = with_residuals
        try:
            prediction: Tensor = self.denoiser(*values[: self.inputs])
        finally:
            self.denoiser.unet.forward = forward
        return prediction


def controlled_component(source: Source, *, seed: int = 0) -> Component:
    """The denoiser with residuals behind its inputs, to compare with; sizes are such that every level halves evenly.

    Raises:
        SourceError: if the denoiser cannot be built.
    """
    family, config = source.family, source.configs[source.family.denoiser]
    plain = load_component(source, family.denoiser, seed=seed)
    roles = plain.roles
    assert roles is not None
    generator = torch.Generator().manual_seed(seed)
    shapes, side = residual_shapes(config), 2 * 2 ** (len(config["block_out_channels"]) - 1)
    example, dynamic = dict(plain.example), dict(plain.dynamic)
    sample = example[roles.sample]
    example[roles.sample] = torch.randn(*sample.shape[:2], side, 2 * side, generator=generator)
    for number, (width, height_name, width_name) in enumerate(shapes):
        level = int(height_name.removeprefix("latent_height").removeprefix("_") or 0)
        size = (side >> level, 2 * side >> level)
        example[f"residual_{number}"] = torch.randn(2, width, *size, generator=generator)
        dynamic[f"residual_{number}"] = {0: "batch", 2: height_name, 3: width_name}
    module = Controlled(plain.module, len(plain.example), len(shapes))
    return dataclasses.replace(plain, name=controlled(family.denoiser), module=module, example=example, dynamic=dynamic)


def export_controlled(source: Source, whole: Graph, step: Graph, form: Form, directory: Path) -> dict[str, Graph]:
    """Give the denoiser's whole graph and its step a twin each that takes residuals; both use the file of weights.

    Args:
        source: The denoiser's, with ControlNets.
        whole: Its exported graph.
        step: Its last stage.
        form: Operator set and precision of the two.
        directory: The bundle under construction.

    Returns:
        By component the graphs' entries for the manifest.

    Raises:
        ExportError: if residuals have no place in the graph, or a graph is not well typed.
    """
    name = controlled(source.family.denoiser)
    shapes = residual_shapes(source.configs[source.family.denoiser])
    found = {}
    for part, graph, stem in ((name, whole, "control"), (f"{name}_{STAGES[-1]}", step, "control_step")):
        model = ir.load(directory / graph.file)
        try:
            take_residuals(model.graph, shapes)
        except ValueError as error:
            raise ExportError(f"{part} takes no residuals: {error}") from error
        float_borders(model.graph)
        path = (directory / graph.file).with_name(f"{stem}{form.suffix}.onnx")
        ir.save(model, path)  # weights in a file of their own stay there
        check_graph(path, part)
        found[part] = graph_entry(model.graph, path.relative_to(directory).as_posix(), form, graph.external)
    return found


def control_ranges(
    source: Source, ranges: Mapping[str, Mapping[str, Range]], pixels: Mapping[str, Range]
) -> dict[str, dict[str, Range]]:
    """Ranges of every symbol of what ControlNets bring along.

    Args:
        source: The denoiser's.
        ranges: Those of the denoiser's own stages, by component.
        pixels: ``height`` and ``width``.
    """
    prompt, schedule, step = (dict(ranges[stage]) for stage in source.family.stages())
    levels: dict[str, Range] = {}
    for _, *names in residual_shapes(source.configs[source.family.denoiser]):
        for name in names:
            axis, _, level = name.removeprefix("latent_").partition("_")
            levels[name] = _shrunk(step[f"latent_{axis}"], int(level or 0))
    found = {f"{controlled(source.family.denoiser)}_{STAGES[-1]}": {**step, **levels}}
    for net in source.controlnets:
        found[f"{net.body}_image"] = {"batch": step["batch"], **pixels}
        found |= {
            f"{net.body}_{stage}": each
            for stage, each in zip(STAGES, (prompt, schedule, {**step, **levels}), strict=True)
        }
    return found


def _shrunk(lengths: Range, level: int) -> Range:
    """Lengths after that many halvings, each of which rounds up."""
    halved: Callable[[int], int] = lambda length: -(-length >> level)  # noqa: E731
    return Range(halved(lengths.min), halved(lengths.opt), halved(lengths.max))
