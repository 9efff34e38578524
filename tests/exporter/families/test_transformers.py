"""Families of flow matching (``flow``, ``sd3``, ``flux``, ``t5``): sources that do not fit, and half precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.engines.trt import BuildOptions, Profile, Range, build_plan, load_sdk
from latentrt.exporter.builder.build import build_bundle
from latentrt.exporter.builder.request import BuildRequest
from latentrt.exporter.families.flux import Rotation
from latentrt.exporter.graphs.export import export_component
from latentrt.exporter.graphs.stages import export_stages
from latentrt.exporter.graphs.targets import Form
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.verification.bundle import stages_psnr
from latentrt.exporter.verification.components import GATES
from latentrt.runtime.bundle.reader import Bundle

EditJson = Callable[..., None]


@pytest.fixture
def copied(tiny: Any, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of tiny sources that a test may damage."""
    return lambda kind: Path(shutil.copytree(tiny.source(kind), tmp_path / "source"))


@pytest.mark.parametrize(
    ("kind", "file", "changes", "message"),
    [
        ("sd35", "transformer", {"joint_attention_dim": 64}, "CLIP's states are 80 wide together, but the transformer"),
        ("sd35", "transformer", {"joint_attention_dim": 128}, "states of text_encoder_3 are 96 wide, but .* takes 128"),
        ("sd35", "transformer", {"pooled_projection_dim": 41}, "pooled states are 40 wide together, but .* takes 41"),
        ("sd35", "transformer", {"in_channels": 4, "out_channels": 4}, "latents have 8 channels, but the transformer"),
        (
            "sd35",
            "transformer",
            {"out_channels": 16},
            "the transformer takes 8 channels and gives 16, expected as many",
        ),
        ("sd35", "transformer", {"pos_embed_max_size": 8}, "'pos_embed_max_size' is 8, expected 16 or more"),
        ("sd35", "text_encoder_2", {"max_position_embeddings": 64}, "take 64 and 77 tokens, expected one length"),
        ("sd35", "text_encoder", {"num_hidden_layers": 1}, "'num_hidden_layers' is 1, expected 2 or more"),
        (
            "sd35",
            "text_encoder_3",
            {"d_ff": 0},
            "text_encoder_3/config.json: 'd_ff' is 0, expected 1 or more",
        ),
        (
            "flux-dev",
            "transformer",
            {"pooled_projection_dim": 31},
            "pooled state is 32 wide, but the transformer takes",
        ),
        ("flux-dev", "transformer", {"joint_attention_dim": 64}, "text_encoder_2 are 48 wide, but .* takes 64"),
        ("flux-dev", "transformer", {"in_channels": 96}, "latents have 8 channels, but the transformer takes 24"),
        ("flux-dev", "transformer", {"in_channels": 98}, "for filling or editing, which take more, are not supported"),
        (
            "flux-dev",
            "transformer",
            {"axes_dims_rope": [4, 6, 8]},
            "even numbers that sum up to the width of a head, 16",
        ),
        ("flux-dev", "transformer", {"axes_dims_rope": 16}, "'axes_dims_rope' is 16, expected three whole numbers"),
        ("flux-dev", "transformer", {"guidance_embeds": "yes"}, "'guidance_embeds' is 'yes', expected true or false"),
    ],
)
def test_parts_that_do_not_fit(
    copied: Callable[[str], Path], edit_json: EditJson, kind: str, file: str, changes: dict[str, Any], message: str
) -> None:
    """Configurations that contradict each other or that are not supported are refused, and told apart."""
    source = copied(kind)
    edit_json(source / file / "config.json", **changes)
    with pytest.raises(SourceError, match=message):
        open_source(source)


def test_a_scheduler_that_no_flow_is_drawn_with(copied: Callable[[str], Path], edit_json: EditJson) -> None:
    """A shift by size is probed with a size, and a scheduler that cannot shift is refused when the source is opened."""
    source = copied("flux-dev")
    open_source(source)
    edit_json(source / "scheduler" / "scheduler_config.json", _class_name="FlowMatchHeunDiscreteScheduler")
    with pytest.raises(SourceError, match=r"scheduler_config.json: sampler 'flow-heun' cannot shift"):
        open_source(source)


def test_t5_may_be_missing(tiny: Any, copied: Callable[[str], Path], edit_json: EditJson) -> None:
    """A source without T5 gives a bundle without; one whose T5 is left out of the index too, whatever lies there."""
    opened = open_source(tiny.source("sd3"))
    assert opened.family.settings(opened)["t5"] is False
    assert "text_encoder_3" not in Bundle.open(tiny.bundle("sd3")).manifest.components
    assert set(Bundle.open(tiny.bundle("sd3")).manifest.tokenizers) == {"tokenizer", "tokenizer_2"}
    manifest = Bundle.open(tiny.bundle("sd35")).manifest
    tokenizer = manifest.tokenizers["tokenizer_3"]
    assert (manifest.settings["t5"], tokenizer.kind, tokenizer.max_length, tokenizer.pad_token_id) == (
        True,
        "t5",
        512,
        0,
    )
    source = copied("sd35")
    edit_json(source / "model_index.json", text_encoder_3=[None, None])
    reduced = open_source(source)
    assert reduced.family.settings(reduced)["t5"] is False
    assert reduced.family.name == "stable-diffusion-3"
    edit_json(source / "model_index.json", text_encoder_3=["transformers", "BertModel"])
    with pytest.raises(
        SourceError, match="text_encoder_3 of source has the class 'BertModel', expected T5EncoderModel"
    ):
        open_source(source)


def test_t5_weights_under_either_name(tiny: Any, copied: Callable[[str], Path]) -> None:
    """The table of embeddings may be stored as one or the other of its two names."""
    from safetensors.torch import load_file, save_file

    source = copied("sd35")
    file = source / "text_encoder_3" / "model.safetensors"
    tensors = load_file(file)
    (stored,) = [name for name in tensors if name in ("shared.weight", "encoder.embed_tokens.weight")]
    other = {"shared.weight": "encoder.embed_tokens.weight"}.get(stored, "shared.weight")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = open_source(source).load("text_encoder_3")(ids)[0]
        save_file({other if name == stored else name: tensor for name, tensor in tensors.items()}, file)
        after = open_source(source).load("text_encoder_3")(ids)[0]
        del tensors[stored]
        save_file(tensors, file)
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    with pytest.raises(SourceError, match=r"weights of text_encoder_3 do not fit its config\.json"):
        open_source(source).load("text_encoder_3")


def test_positions_are_those_of_diffusers() -> None:
    """The tables that the graph looks positions up in hold what diffusers computes for the ids of its pipeline."""
    text, rows, columns = 5, 7, 3
    ids = torch.zeros(text + rows * columns, 3)
    ids[text:, 1] = torch.arange(rows).repeat_interleave(columns)
    ids[text:, 2] = torch.arange(columns).repeat(rows)
    for widths in ((4, 6, 6), (16, 56, 56), (2, 4, 8)):
        expected = FluxPosEmbed(theta=10000, axes_dim=list(widths))(ids)
        received = Rotation(widths, 64)(text, rows, columns)
        for ours, theirs in zip(received, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_sizes_that_no_patch_fits(tiny: Any, tmp_path: Path) -> None:
    """A profile whose sizes are no multiples of a patch is refused before anything is exported."""
    request = BuildRequest(tiny.source("sd35"), tmp_path / "bundle", ranges={"height": Range(32, 32, 34)})
    with pytest.raises(
        InvalidRequestError, match="height: range 32:32:34 must consist of multiples of 4, the pixels of a"
    ):
        build_bundle(request)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.heavy
def test_half_precision_is_well_typed_and_builds(tiny: Any, tmp_path: Path) -> None:
    """In fp16 the stages pass ONNX's strict type check, compute the same, and TensorRT-RTX makes plans of them."""
    source = open_source(tiny.source("flux-dev"))
    part, form = Model(source).load_component("transformer"), Form(23, "fp16")
    whole = export_component(part, form, tmp_path)
    stages = export_stages(part, whole, form, tmp_path)
    dtypes = {spec.name: spec.dtype for spec in whole.inputs}
    assert {dtypes[name] for name in dtypes if name not in ("timestep", "guidance_scale")} == {"float16"}
    assert {dtypes.get(name, "float32") for name in ("timestep", "guidance_scale")} == {"float32"}
    assert stages_psnr(part, stages, tmp_path) >= GATES["fp16"]
    for graph in (whole, *stages.values()):
        onnx.checker.check_model(str(tmp_path / graph.file), full_check=True)
        doubles = [
            each for each in onnx.load(tmp_path / graph.file).graph.value_info if each.type.tensor_type.elem_type == 11
        ]
        assert not doubles, "TensorRT has no double precision"
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an optional extra")
    sdk = load_sdk("tensorrt-rtx")
    ranges = {"batch": Range.fixed(1), "rows": Range(1, 2, 2), "registers": Range(1, 2, 2), "terms": Range(3, 4, 4)}
    ranges |= {"latent_height": Range(8, 16, 16), "latent_width": Range(8, 16, 16), **source.family.lengths(source)}
    for name, stage in stages.items():
        plan = tmp_path / f"{name}.plan"
        build_plan(sdk, tmp_path / stage.file, plan, Profile.of(stage.inputs, ranges), options=BuildOptions())
        assert plan.stat().st_size > 1000


def test_the_graph_takes_any_length(tiny: Any) -> None:
    """Texts, rows and both sides of a picture are variable in the transformer, texts in T5, and nothing else is."""
    for kind, extra in (("sd35", set()), ("flux-dev", {"guidance_scale"})):
        bundle = Bundle.open(tiny.bundle(kind))
        shapes = {spec.name: spec.shape for spec in bundle.graph("transformer", "opset20-fp32").inputs}
        assert shapes["sample"] == ("batch", 8, "latent_height", "latent_width")
        assert shapes["encoder_hidden_states"][:2] == ("batch", "text_length")
        assert set(shapes) == {"sample", "timestep", "encoder_hidden_states", "pooled_projections"} | extra
        assert all(np.size(shapes[name]) == 1 for name in ("timestep", *extra))
        (ids,) = bundle.graph("text_encoder_3" if kind == "sd35" else "text_encoder_2", "opset20-fp32").inputs
        assert ids.shape == ("batch", "length")
