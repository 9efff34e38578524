"""A denoiser in stages: what runs once a prompt, once a schedule, and once a step of the loop, each a graph."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from latentrt.engines.errors import ExportError
from latentrt.runtime.bundle.manifest import STAGES, Graph

from ..components import Component
from ..passes.borders import float_borders
from ..passes.guidance import share_guidance
from ..passes.lengths import measure_elsewhere
from ..passes.reshapes import reshape_by_own_lengths
from ..passes.residuals import chain_residuals
from ..passes.stages import split_stages
from ..passes.update import fuse_update, read_registers
from .export import graph_entry
from .targets import Form
from .type_check import check_graph


def export_stages(component: Component, whole: Graph, form: Form, directory: Path) -> dict[str, Graph]:
    """Split an exported denoiser, share what guidance leaves equal, and fuse the sampler's update into the step.

    A ControlNet is split alike; its step reads the sampler's registers, and adds up residuals.

    The graphs are written beside the whole one and use its file of weights.

    Args:
        component: The denoiser, or a ControlNet, with its roles.
        whole: Its exported graph.
        form: Operator set and precision of that.
        directory: The bundle under construction.

    Returns:
        By component (such as ``unet_prompt``, ``unet_schedule``, ``unet_step``) the graphs' entries for the manifest; a
        stage that has nothing to compute is left out.

    Raises:
        ExportError: if the graph cannot be split, or a stage is not well typed.
    """
    roles = component.roles
    if roles is None:
        raise ExportError(f"{component.name} has no stages: it is not a denoiser")
    model = ir.load(directory / whole.file)
    try:
        reshape_by_own_lengths(model.graph)
        stages = split_stages(model.graph, conditioning=roles.conditioning, time=roles.time, vectors=roles.vectors)
        measure_elsewhere(stages.step, among=stages.prompt_tensors)
        of_vectors = () if stages.schedule is None else [str(value.name) for value in stages.schedule.inputs]
        schedule_is_a_row = any(name in roles.vectors for name in of_vectors)
        conditioned = [*stages.prompt_tensors, *(stages.schedule_tensors if schedule_is_a_row else ())]
        left = [str(value.name) for value in stages.step.inputs if value.name in roles.conditioning]
        share_guidance(stages.step, conditioned=[*conditioned, *left])
        if roles.residuals:
            read_registers(stages.step, sample=roles.sample)
            chain_residuals(stages.step, roles.residuals)
        else:
            fuse_update(stages.step, sample=roles.sample, prediction=roles.prediction)
    except ValueError as error:
        raise ExportError(f"{component.name} could not be split into stages: {error}") from error
    graphs = {}
    for name, graph in zip(STAGES, (stages.prompt, stages.schedule, stages.step), strict=True):
        if graph is None:
            continue
        float_borders(graph)
        path = directory / component.name / f"{name}{form.suffix}.onnx"
        ir.save(ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name), path)
        check_graph(path, f"{component.name}, stage {name}")
        weights = [value.const_value for value in graph.initializers.values()]
        external = whole.external if any(isinstance(weight, ir.ExternalTensor) for weight in weights) else ()
        graphs[f"{component.name}_{name}"] = graph_entry(graph, path.relative_to(directory).as_posix(), form, external)
    return graphs
