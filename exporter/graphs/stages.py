"""Export a denoiser in stages: a graph each for the prompt, the schedule, and a step of the loop."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from latentrt.engines.errors import ExportError
from latentrt.runtime.bundle.manifest import STAGES, Graph

from ..components import Component, Roles
from ..passes.borders import float_borders
from ..passes.guidance import share_guidance
from ..passes.lengths import measure_elsewhere
from ..passes.reshapes import reshape_by_own_lengths
from ..passes.residuals import chain_residuals
from ..passes.stages import Stages, split_stages
from ..passes.update import fuse_update, read_registers
from .export import graph_entry
from .targets import Form
from .type_check import check_graph


def export_stages(component: Component, whole: Graph, form: Form, directory: Path) -> dict[str, Graph]:
    """Split an exported denoiser into stages, and write each as a graph beside the whole one.

    The stages use the whole graph's file of weights. A ControlNet is split in the same way; its step reads the latent
    from the sampler's registers, and adds its residuals to those of other ControlNets.

    Steps:
        1. The graph is split, and the step is fused with guidance and the sampler's update, see :func:`_split`.
        2. Each stage gets inputs and outputs of fp32 in place of bf16, is written, and is checked.

    Args:
        component: The denoiser, or a ControlNet, with its roles.
        whole: The manifest's entry of its exported graph.
        form: Operator set and precision of that graph.
        directory: The bundle under construction.

    Returns:
        The manifest's entries by name, such as ``unet_prompt``, ``unet_schedule`` and ``unet_step``. A stage that has
        nothing to compute is left out.

    Raises:
        ExportError: if the graph cannot be split, or a stage is not well typed.
    """
    roles = component.roles
    if roles is None:
        raise ExportError(f"{component.name} has no stages: it is not a denoiser")
    model = ir.load(directory / whole.file)
    try:
        stages = _split(model.graph, roles)
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


def _split(graph: ir.Graph, roles: Roles) -> Stages:
    """Split a denoiser's graph, and turn its step into one step of the whole loop.

    Steps:
        1. Shapes are said in terms of the tensors that they belong to, so that no stage depends on an input for
           nothing but its length; then the graph is split.
        2. The step measures lengths on what the prompt stage computes, and loses inputs that it needs for nothing else.
        3. What is equal in both halves of guidance is computed once.
        4. A denoiser gets guidance and the sampler's update. A ControlNet reads the registers, and adds its residuals
           to a sum.

    Args:
        graph: The whole denoiser, or a ControlNet. Its reshapes change in place.
        roles: Which of its inputs and outputs is what.

    Raises:
        ValueError: if roles and graph do not fit each other.
    """
    # Step 1.
    reshape_by_own_lengths(graph)
    stages = split_stages(graph, conditioning=roles.conditioning, time=roles.time, vectors=roles.vectors)
    # Step 2.
    measure_elsewhere(stages.step, among=stages.prompt_tensors)
    # Step 3: a schedule that uses vectors of the prompt computes other values for the other half.
    schedule_inputs = () if stages.schedule is None else [str(value.name) for value in stages.schedule.inputs]
    by_half = any(name in roles.vectors for name in schedule_inputs)
    conditioned = [*stages.prompt_tensors, *(stages.schedule_tensors if by_half else ())]
    left = [str(value.name) for value in stages.step.inputs if value.name in roles.conditioning]
    share_guidance(stages.step, conditioned=[*conditioned, *left])
    # Step 4.
    if roles.residuals:
        read_registers(stages.step, sample=roles.sample)
        chain_residuals(stages.step, roles.residuals)
    else:
        fuse_update(stages.step, sample=roles.sample, prediction=roles.prediction)
    return stages
