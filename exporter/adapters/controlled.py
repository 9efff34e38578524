"""The denoiser's twin that takes a ControlNet's residuals, so that a run without ControlNets pays nothing for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from latentrt.engines.errors import ExportError
from latentrt.engines.trt import Range
from latentrt.runtime.bundle.manifest import STAGES, Graph, controlled

from ..components import Component
from ..graphs.export import graph_entry
from ..graphs.targets import Form
from ..graphs.type_check import check_graph
from ..passes.borders import float_borders
from ..passes.residuals import take_residuals
from .residuals import Shape, level_of


class Controlled(nn.Module):
    """A denoiser that takes residuals after its own inputs; the twin's graphs are compared with it.

    It is not exported itself: the twin's graphs are made of the denoiser's.

    Args:
        denoiser: The denoiser's module, as it is exported.
        inputs: How many inputs that has.
    """

    def __init__(self, denoiser: nn.Module, inputs: int) -> None:
        super().__init__()
        self.denoiser: Any = denoiser
        self.inputs = inputs

    def forward(self, *values: Tensor) -> Tensor:
        """Predict from the denoiser's inputs and the residuals, of which the last is the middle's."""
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


def controlled_component(
    plain: Component, config: Mapping[str, Any], shapes: tuple[Shape, ...], generator: torch.Generator
) -> Component:
    """The denoiser with residuals after its inputs, to compare with; sizes are such that every level halves evenly.

    Args:
        plain: The denoiser.
        config: Its ``config.json``.
        shapes: Its residuals.
        generator: Example latents and residuals are drawn from it.
    """
    roles = plain.roles
    assert roles is not None
    side = 2 * 2 ** (len(config["block_out_channels"]) - 1)
    example, dynamic = dict(plain.example), dict(plain.dynamic)
    sample = example[roles.sample]
    example[roles.sample] = torch.randn(*sample.shape[:2], side, 2 * side, generator=generator)
    for number, (width, height_name, width_name) in enumerate(shapes):
        level = level_of(height_name)
        size = (side >> level, 2 * side >> level)
        example[f"residual_{number}"] = torch.randn(2, width, *size, generator=generator)
        dynamic[f"residual_{number}"] = {0: "batch", 2: height_name, 3: width_name}
    module = Controlled(plain.module, len(plain.example))
    return dataclasses.replace(plain, name=controlled(plain.name), module=module, example=example, dynamic=dynamic)


def export_controlled(
    name: str, shapes: tuple[Shape, ...], whole: Graph, step: Graph, directory: Path
) -> dict[str, Graph]:
    """Give the denoiser's whole graph and its step a twin each that takes residuals; both use the file of weights.

    Args:
        name: Name of the twin.
        shapes: The denoiser's residuals.
        whole: Its exported graph.
        step: Its last stage.
        directory: The bundle under construction.

    Returns:
        By component the graphs' entries for the manifest.

    Raises:
        ExportError: if residuals have no place in the graph, or a graph is not well typed.
    """
    form, found = Form(whole.opset, whole.precision), {}
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


def with_levels(step: Mapping[str, Range], shapes: tuple[Shape, ...]) -> dict[str, Range]:
    """Ranges of a denoiser's step, and of heights and widths of the residuals that go with it."""
    ranges = dict(step)
    for _, *names in shapes:
        for name in names:
            axis = name.removeprefix("latent_").partition("_")[0]
            ranges[name] = _halved(step[f"latent_{axis}"], level_of(name))
    return ranges


def _halved(lengths: Range, times: int) -> Range:
    """Lengths after that many halvings, each of which rounds up."""
    least, best, most = (-(-length >> times) for length in (lengths.min, lengths.opt, lengths.max))
    return Range(least, best, most)
