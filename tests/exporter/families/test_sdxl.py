"""Exporting Stable Diffusion XL: sources that do not fit, and half precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from latentrt.engines.errors import SourceError
from latentrt.exporter.graphs.export import export_component
from latentrt.exporter.graphs.stages import export_stages
from latentrt.exporter.graphs.targets import Form
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.verification.bundle import stages_psnr
from latentrt.exporter.verification.components import GATES

EditJson = Callable[..., None]


@pytest.fixture
def source(tiny: Any, tmp_path: Path) -> Path:
    """A copy of the tiny source that a test may damage."""
    return Path(shutil.copytree(tiny.source("sdxl"), tmp_path / "source"))


def settings(path: Path) -> dict[str, Any]:
    """What a build would write into the manifest of a source."""
    opened = open_source(path)
    return opened.family.settings(opened)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"cross_attention_dim": 32}, "states are 80 wide together, but the U-Net takes 32"),
        ("text_encoder_2/config.json", {"projection_dim": 25}, "6 sizes are 73 wide, but the U-Net takes 72"),
        ("unet/config.json", {"addition_time_embed_dim": 16}, "6 sizes are 120 wide, but the U-Net takes 72"),
        ("unet/config.json", {"addition_embed_type": None}, "'addition_embed_type' is None, expected 'text_time'"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "'num_hidden_layers' is 1, expected 2 or more"),
        ("text_encoder/config.json", {"max_position_embeddings": 64}, "take 64 and 77 tokens, expected one length"),
        ("vae/config.json", {"latents_mean": [0.5] * 4}, "has means or deviations of its latents"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "the class 'CLIPTextModel'"),
        ("model_index.json", {"tokenizer_2": [None, None]}, "tokenizer_2 of source has the class None"),
        ("model_index.json", {"force_zeros_for_empty_prompt": "yes"}, "is 'yes', expected true or false"),
    ],
)
def test_parts_that_do_not_fit(
    source: Path, edit_json: EditJson, file: str, changes: dict[str, Any], message: str
) -> None:
    """Configurations that contradict each other or that are not supported are refused, and told apart."""
    edit_json(source / file, **changes)
    with pytest.raises(SourceError, match=message):
        settings(source)


def test_a_tokenizer_with_more_tokens_than_its_encoder(source: Path, edit_json: EditJson) -> None:
    """Each tokenizer is held against its own text encoder."""
    edit_json(source / "text_encoder_2" / "config.json", vocab_size=8)
    opened = open_source(source)
    opened.load_tokenizer("tokenizer")
    with pytest.raises(SourceError, match=r"the tokenizer_2 of source has token ids up to .*, its text encoder only 8"):
        opened.load_tokenizer("tokenizer_2")


@pytest.mark.heavy
def test_half_precision_is_well_typed(tiny: Any, tmp_path: Path) -> None:
    """In fp16 the U-Net's graphs pass ONNX's strict type check and TensorRT-RTX's parser, and compute the same."""
    part, form = Model(open_source(tiny.source("sdxl"))).load_component("unet"), Form(23, "fp16")
    whole = export_component(part, form, tmp_path)
    stages = export_stages(part, whole, form, tmp_path)
    dtypes = {spec.name: spec.dtype for spec in whole.inputs}
    assert (dtypes["text_embeds"], dtypes["time_ids"], dtypes["timestep"]) == ("float16", "float32", "float32")
    assert {spec.name for spec in stages["unet_schedule"].inputs} == {"timestep", "text_embeds", "time_ids"}
    assert stages_psnr(part, stages, tmp_path) >= GATES["fp16"]
    for graph in (whole, *stages.values()):
        onnx.checker.check_model(str(tmp_path / graph.file), full_check=True)
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an optional extra")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    for graph in stages.values():
        network = builder.create_network(0)  # which the parser does not keep alive
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse_from_file(str(tmp_path / graph.file))
        assert parsed, [parser.get_error(number).desc() for number in range(parser.num_errors)]
