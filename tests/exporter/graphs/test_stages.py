"""Stages of denoisers of every family, as graphs: a guided step through them is guidance over the whole graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from latentrt.engines import Array
from latentrt.engines.errors import ExportError, VerificationError
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.exporter.components import Component
from latentrt.exporter.graphs.stages import export_stages
from latentrt.exporter.graphs.targets import Form
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.verification.components import check_stages
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.families import family_of

FORM = Form(20, "fp32")


def resized(inputs: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, str]], rows: int, factor: float) -> Any:
    """Random inputs with another number of rows, and all other lengths that vary times ``factor``."""
    found = {}
    for name, tensor in inputs.items():
        names = dynamic[name]
        shape = [
            rows if names.get(axis) == "batch" else int(length * factor) // 2 * 2 if axis in names else length
            for axis, length in enumerate(tensor.shape)
        ]
        found[name] = (
            (torch.rand(shape) * tensor.abs().max()).numpy() if tensor.ndim < 3 else torch.randn(shape).numpy()
        )
    return found


@dataclass(frozen=True)
class Staged:
    """A denoiser with its graphs, which lie in a folder."""

    part: Component
    whole: Graph
    stages: Mapping[str, Graph]
    folder: Path


@pytest.fixture(params=["sdxl", "sd35", "flux-dev"])
def staged(request: pytest.FixtureRequest, tiny: Any) -> Staged:
    """Those of a tiny bundle."""
    bundle, source = Bundle.open(tiny.bundle(request.param)), open_source(tiny.source(request.param))
    family = family_of(bundle.manifest)
    graphs = {name: bundle.graph(name, FORM.name) for name in family.stages()}
    return Staged(
        Model(source).load_component(family.denoiser), bundle.graph(family.denoiser, FORM.name), graphs, bundle.path
    )


@pytest.mark.heavy
def test_a_step_in_stages_is_guidance_over_the_whole(staged: Staged) -> None:
    """At batches of 1 and 3 and at two sizes the staged, shared and fused step agrees to 1e-5."""
    torch.manual_seed(0)
    part, whole, graphs = staged.part, staged.whole, staged.stages
    roles = part.roles
    assert roles is not None
    assert roles.sample not in {spec.name for spec in graphs[f"{part.name}_step"].inputs}
    with ExitStack() as stack:
        plain = stack.enter_context(OnnxRuntimeEngine(staged.folder / whole.file))
        engines = {
            n: stack.enter_context(OnnxRuntimeEngine(staged.folder / g.file, label=n)) for n, g in graphs.items()
        }
        assert check_stages(part, engines, "fp32").psnr >= 80
        for batch, factor in itertools.product((1, 3), (1.0, 1.5)):
            both = resized(part.example, part.dynamic, 2 * batch, factor)
            for name in (roles.sample, *roles.time):
                both[name][batch:] = both[name][:batch]
            low, high = np.split(plain.run(both)[roles.prediction], 2)
            expected = low + 3 * (high - low)
            known: dict[str, Array] = dict(both)
            prompt, schedule, step = engines.values()
            known |= prompt.run({n: both[n] for n in prompt.inputs})
            rows = 2 * batch if any(n in roles.vectors for n in schedule.inputs) else batch
            known |= schedule.run({n: both[n][:rows] for n in schedule.inputs})
            known |= {n: both[n][:batch] for n in roles.time}
            each = np.arange(batch)
            known |= {
                "registers": both[roles.sample][:batch, None],
                "noise": np.zeros_like(both[roles.sample][:batch]),
                "update": np.repeat(np.array([[[0, 1, 0]]], np.float32), batch, axis=0),
                "input_scale": np.ones(batch, np.float32),
                "guidance": np.full(batch, 3, np.float32),
                "guidance_rescale": np.zeros(batch, np.float32),
                "rows": np.concatenate([each, each]),
                "unconditional": each,
                "conditional": each + batch,
            }
            result = step.run({n: known[n] for n in step.inputs})["updated_registers"][:, 0]
            assert np.linalg.norm(result - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.heavy
def test_weights_are_there_once(tiny_bundles: dict[str, Path]) -> None:
    """The whole U-Net and its stages name one file of weights, and each of its bytes for one stage at most."""
    folder = tiny_bundles["sd1"] / "unet"
    spans: dict[str, list[tuple[int, int]]] = {}
    for name in ("prompt", "schedule", "step", "model"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        entries = [{e.key: e.value for e in tensor.external_data} for tensor in graph.initializer]
        outside = [entry for entry in entries if entry]
        assert {entry["location"] for entry in outside} == {"model.onnx.data"}
        spans[name] = sorted((int(entry["offset"]), int(entry["length"])) for entry in outside)
    assert sorted(spans["prompt"] + spans["schedule"] + spans["step"]) == spans["model"]
    assert sorted(path.name for path in folder.glob("*.data")) == ["model.onnx.data"]


@pytest.mark.heavy
def test_a_stage_that_computes_something_else_is_refused(tiny_source: Path, tiny_bundles: dict[str, Path]) -> None:
    """A step of another model falls below the gate, with a sentence of its own."""
    part = Model(open_source(tiny_source)).load_component("unet")
    for weight in part.module.parameters():
        weight.data *= 1.1
    with ExitStack() as stack:
        engines = {
            f"unet_{name}": stack.enter_context(OnnxRuntimeEngine(tiny_bundles["sd1"] / "unet" / f"{name}.onnx"))
            for name in ("prompt", "schedule", "step")
        }
        with pytest.raises(VerificationError, match=r"unet in stages \(fp32\) does not compute what its source"):
            check_stages(part, engines, "fp32")
        del engines["unet_schedule"]
        with pytest.raises(VerificationError, match=r"unet in stages needs '.*', which no stage computes"):
            check_stages(part, engines, "fp32")


def test_what_cannot_be_split(tiny_source: Path, tiny_bundle: Path) -> None:
    """A component without roles, and roles that do not fit the graph, are named in one sentence."""
    bundle = Bundle.open(tiny_bundle)
    before = sorted(tiny_bundle.rglob("*"))
    part, whole = Model(open_source(tiny_source)).load_component("unet"), bundle.graph("unet", FORM.name)
    with pytest.raises(ExportError, match="unet has no stages: it is not a denoiser"):
        export_stages(replace(part, roles=None), whole, FORM, bundle.path)
    assert part.roles is not None
    for wrong in (replace(part.roles, conditioning=("text",)), replace(part.roles, prediction="noise")):
        with pytest.raises(ExportError, match="unet could not be split into stages: the graph has no"):
            export_stages(replace(part, roles=wrong), whole, FORM, bundle.path)
    assert sorted(tiny_bundle.rglob("*")) == before
