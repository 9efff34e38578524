"""Stages of denoisers of every family, as graphs: a guided step through them is guidance over the whole graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from latentrt.engines import Array
from latentrt.engines.errors import ExportError, VerificationError
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.exporter.components import Component, Roles, load_component
from latentrt.exporter.onnx_export import export_component
from latentrt.exporter.source import Source
from latentrt.exporter.stages import export_stages
from latentrt.exporter.targets import Form
from latentrt.exporter.verify import check_stages
from latentrt.runtime.bundle import Bundle
from latentrt.runtime.families import family_of
from latentrt.runtime.manifest import Graph

FORM = Form(20, "fp32")
TEXT, POOLED = 32, 16


class Wrapper(nn.Module):
    """A diffusers model behind tensors only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(requires_grad=False)


class Sd3(Wrapper):
    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        prediction: Tensor = self.model(sample, text, pooled, timestep, return_dict=False)[0]
        return prediction


class Flux(Wrapper):
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: Tensor,
        pooled: Tensor,
        embedding: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        prediction: Tensor = self.model(sample, text, pooled, timestep, img_ids, txt_ids, embedding, return_dict=False)[
            0
        ]
        return prediction


def component(model: nn.Module, example: dict[str, Tensor], dynamic: Any, roles: Roles) -> Component:
    dynamic = {name: dynamic.get(name, {0: "batch"}) for name in example}
    return Component("unet", model, example, dynamic, (roles.prediction,), frozenset({"timestep"}), roles)


def sd3() -> Component:
    """A transformer over text and latents."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=32,
    )

    example = {
        "sample": torch.randn(2, 4, 12, 20),
        "timestep": torch.rand(2) * 999,
        "text": torch.randn(2, 21, TEXT),
        "pooled": torch.randn(2, POOLED),
    }
    roles = Roles("sample", "out_sample", ("text", "pooled"), ("timestep",), ("pooled",))
    return component(Sd3(model), example, {"sample": {0: "batch", 2: "latent_height", 3: "latent_width"}}, roles)


def flux() -> Component:
    """A transformer over packed latents, with positions as inputs and a guidance embedding."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )

    example = {
        "sample": torch.randn(2, 15, 16),
        "timestep": torch.rand(2),
        "text": torch.randn(2, 21, TEXT),
        "pooled": torch.randn(2, POOLED),
        "embedding": torch.rand(2) * 4,
        "img_ids": torch.arange(45.0).reshape(15, 3),
        "txt_ids": torch.zeros(21, 3),
    }
    vectors = ("pooled", "embedding")
    conditioning = ("text", *vectors, "img_ids", "txt_ids")
    dynamic = {"sample": {0: "batch", 1: "tokens"}, "img_ids": {0: "tokens"}, "txt_ids": {}}
    return component(Flux(model), example, dynamic, Roles("sample", "out_sample", conditioning, ("timestep",), vectors))


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


@pytest.fixture(params=["sdxl", sd3, flux], ids=["sdxl", "sd3", "flux"])
def staged(request: pytest.FixtureRequest, tiny: Any, tmp_path: Path) -> Staged:
    """Those of a bundle, or of a model made here."""
    if isinstance(request.param, str):
        bundle, part = Bundle.open(tiny.bundle("sdxl")), load_component(Source.open(tiny.source("sdxl")), "unet")
        graphs = {name: bundle.graph(name, FORM.name) for name in family_of(bundle.manifest).stages()}
        return Staged(part, bundle.graph("unet", FORM.name), graphs, bundle.path)
    torch.manual_seed(0)
    part = request.param()
    whole = export_component(part, FORM, tmp_path)
    return Staged(part, whole, export_stages(part, whole, FORM, tmp_path), tmp_path)


@pytest.mark.heavy
def test_a_step_in_stages_is_guidance_over_the_whole(staged: Staged) -> None:
    """At batches of 1 and 3 and at two sizes the staged, shared and fused step agrees to 1e-5."""
    part, whole, graphs = staged.part, staged.whole, staged.stages
    roles = part.roles
    assert roles is not None
    assert set(graphs) == {"unet_prompt", "unet_schedule", "unet_step"}
    assert "sample" not in {spec.name for spec in graphs["unet_step"].inputs}
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
            known |= engines["unet_prompt"].run({n: both[n] for n in engines["unet_prompt"].inputs})
            schedule = engines["unet_schedule"]
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
            step = engines["unet_step"]
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
    part = load_component(Source.open(tiny_source), "unet")
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
    part, whole = load_component(Source.open(tiny_source), "unet"), bundle.graph("unet", FORM.name)
    with pytest.raises(ExportError, match="unet has no stages: it is not a denoiser"):
        export_stages(replace(part, roles=None), whole, FORM, bundle.path)
    assert part.roles is not None
    for wrong in (replace(part.roles, conditioning=("text",)), replace(part.roles, prediction="noise")):
        with pytest.raises(ExportError, match="unet could not be split into stages: the graph has no"):
            export_stages(replace(part, roles=wrong), whole, FORM, bundle.path)
    assert sorted(tiny_bundle.rglob("*")) == before
