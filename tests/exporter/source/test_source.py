"""A source gives modules that compute what the libraries' own loading gives, and its files run no code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from latentrt.exporter.source.opening import open_source

EditJson = Callable[..., None]
Refusal = Callable[..., str]
UNET = "unet/diffusion_pytorch_model.safetensors"
PARTS = ("text_encoder", "unet", "vae")


def test_opens_and_loads(tiny_source: Path) -> None:
    """A whole source gives modules that compute what the libraries' own loading gives."""
    source = open_source(tiny_source)
    assert source.family.name == "stable-diffusion"
    ids = torch.arange(7)[None]
    ours, theirs = source.load("text_encoder"), CLIPTextModel.from_pretrained(tiny_source / "text_encoder")
    with torch.no_grad():
        assert torch.equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
    reference = UNet2DConditionModel.from_pretrained(tiny_source / "unet").state_dict()
    loaded = source.load("unet")
    assert not loaded.training
    assert loaded.state_dict().keys() == reference.keys()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in loaded.state_dict().items())


def test_configs_run_no_code(tiny_source: Path, edit_json: EditJson, tmp_path: Path) -> None:
    """Class names, ``auto_map`` and modules beside the weights, by which a loader could run code, do nothing."""
    witness = tmp_path / "ran"
    code = f"open({str(witness)!r}, 'w').close()\nclass Evil:\n    pass\n"
    for part in (*PARTS, "tokenizer", "scheduler", "."):
        (tiny_source / part / "evil.py").write_text(code)
    for part in PARTS:
        changes = {"_class_name": "evil.Evil", "auto_map": {"AutoModel": "evil.Evil"}, "architectures": ["evil.Evil"]}
        edit_json(tiny_source / part / "config.json", **changes, trust_remote_code=True, custom_pipeline="evil")
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    edit_json(tiny_source / "tokenizer" / "tokenizer_config.json", **tokenizer)
    source = open_source(tiny_source)
    for part in PARTS:
        assert type(source.load(part)).__module__.startswith(("diffusers.", "transformers."))
    assert isinstance(source.load_tokenizer(), CLIPTokenizer)
    assert not witness.exists()


def test_switches_in_configs(tiny_source: Path, edit_json: EditJson) -> None:
    """Library switches in a configuration change neither element type nor what a module returns."""
    edit_json(
        tiny_source / "text_encoder" / "config.json",
        return_dict=False,
        torch_dtype="float16",
        dtype="float16",
        output_attentions=True,
        attn_implementation="evil/kernels",
    )
    module = open_source(tiny_source).load("text_encoder")
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    with torch.no_grad():
        assert module(torch.zeros(1, 3, dtype=torch.int64)).attentions is None


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"norm_num_groups": 7}),
        ("unet", {"down_block_types": ["Evil", "DownBlock2D"]}),
        ("unet", {"down_block_types": 5}),
        ("unet", {"act_fn": {}}),
        ("unet", {"block_out_channels": [32]}),
        ("unet", {"block_out_channels": [32, 128]}),
        ("unet", {"layers_per_block": 2}),
        ("vae", {"latent_channels": 4, "up_block_types": ["Evil"] * 2}),
        ("vae", {"out_channels": 4}),
        ("text_encoder", {"num_attention_heads": 5}),
        ("text_encoder", {"hidden_act": "evil"}),
        ("text_encoder", {"num_hidden_layers": 4}),
        ("text_encoder", {"intermediate_size": 10**6, "num_hidden_layers": 200}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:40],
)
def test_config_and_weights_that_do_not_fit(
    tiny_source: Path, edit_json: EditJson, part: str, changes: dict[str, Any], refusal: Refusal
) -> None:
    """A configuration that describes no model, or another than the weights, is refused; nothing large is allocated."""
    edit_json(tiny_source / part / "config.json", **changes)
    assert part in refusal(tiny_source, load=True)


def test_tokenizer_and_text_encoder_that_do_not_fit(tiny_source: Path, edit_json: EditJson, refusal: Refusal) -> None:
    """A tokenizer with more tokens than the text encoder embeds is refused."""
    file = tiny_source / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("token_embedding.weight")]
    save_file({**tensors, name: tensors[name][:100].clone()}, file)
    edit_json(tiny_source / "text_encoder" / "config.json", vocab_size=100)
    assert "only 100 tokens" in refusal(tiny_source, load=True)
