"""Parts that families share: entries of configurations, names of old checkpoints, and example inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig

from latentrt.engines.trt import Range
from latentrt.exporter.families.parts import (
    EMBEDDINGS,
    LATENT_AXES,
    TEXT_LENGTH,
    clip_names,
    clip_ranges,
    denoiser_axes,
    guidance_input,
    guidance_kind,
    known,
    unet_inputs,
    vae_names,
)
from latentrt.exporter.source.opening import open_source
from latentrt.runtime.text.chunks import MOST_CHUNKS


def test_entries_that_a_constructor_has() -> None:
    """Private entries, switches of the libraries and unknown ones are left out, whichever library has the class."""
    switches = {"torch_dtype": "float16", "_class_name": "Evil", "auto_map": {}, "nonsense": 1}
    assert known({"in_channels": 4, **switches}, UNet2DConditionModel) == {"in_channels": 4}
    assert known({"hidden_size": 8, "return_dict": False, **switches}, CLIPTextConfig) == {"hidden_size": 8}


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_names_of_clip(prefix: str) -> None:
    """Tensors get the names that the installed module has, with or without its prefix; unknown names stay."""
    module = nn.Module()
    inner = nn.Module()
    inner.norm = nn.LayerNorm(2)
    if prefix:
        module.text_model = inner
    else:
        module.norm = inner.norm
    one, two, three = torch.zeros(2), torch.ones(2), torch.ones(3)
    constant = {"text_model.embeddings.position_ids": three}
    found = clip_names({"text_model.norm.weight": one, "norm.bias": two, "other": three, **constant}, module)
    assert found == {f"{prefix}norm.weight": one, f"{prefix}norm.bias": two, "other": three}


def test_names_of_old_attention() -> None:
    """Only layers of an attention are renamed, and the present names stay as they are."""
    old = (
        "mid.attentions.0.query.weight",
        "mid.attentions.0.proj_attn.bias",
        "mid.key.weight",
        "attentions.0.to_v.bias",
    )
    new = ("mid.attentions.0.to_q.weight", "mid.attentions.0.to_out.0.bias", "mid.key.weight", "attentions.0.to_v.bias")
    assert list(vae_names({name: torch.zeros(1) for name in old}, nn.Identity())) == list(new)


@pytest.mark.parametrize(
    ("kind", "names", "guidance"),
    [
        ("sd1", ("sample", "timestep", "encoder_hidden_states"), "classifier-free"),
        ("sd1-inpaint", ("sample", "inpaint", "timestep", "encoder_hidden_states"), "classifier-free"),
        ("lcm", ("sample", "timestep", "encoder_hidden_states"), "embedded"),
    ],
)
def test_examples_of_a_unet(tiny: Any, kind: str, names: tuple[str, ...], guidance: str) -> None:
    """Latents and masks fill the channels, sides do not halve evenly, and every length that varies has a name."""
    source = open_source(tiny.source(kind))
    unet = source.configs["unet"]
    example = unet_inputs(source, 7, torch.Generator())
    assert tuple(example) == names
    assert sum(example[name].shape[1] for name in names if name in ("sample", "inpaint")) == unet["in_channels"]
    halvings = 2 ** (len(unet["block_out_channels"]) - 1)
    assert halvings == 1 or all(side % halvings for side in example["sample"].shape[2:])
    assert example["encoder_hidden_states"].shape == (2, 7, unet["cross_attention_dim"])
    axes = denoiser_axes(example)
    assert set(axes) == set(example)
    assert (axes["sample"], axes["encoder_hidden_states"][1]) == (LATENT_AXES, TEXT_LENGTH)
    assert guidance_kind(source) == guidance
    scales = guidance_input(source, torch.Generator())
    shapes = {name: tuple(each.shape) for name, each in scales.items()}
    assert shapes == ({"timestep_cond": (2, unet["time_cond_proj_dim"])} if guidance == "embedded" else {})


def test_lengths_of_prompts(tiny: Any) -> None:
    """From one chunk to the most, and added vectors up to the tokens of one."""
    ranges = clip_ranges(open_source(tiny.source("sd1")), "text_encoder")
    assert ranges == {TEXT_LENGTH: Range(77, 77, 77 * MOST_CHUNKS), EMBEDDINGS: Range(1, 1, 77)}
