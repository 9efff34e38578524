"""Published models have the sizes of the authors' own configurations, and their files are recognised."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentrt.exporter.families import PIPELINES
from latentrt.exporter.source.single_file import Header, SingleFileWeights, recognise
from latentrt.exporter.source.single_file_configs import Published

# The parameters of the original configurations: v1-inference.yaml, v2-inference-v.yaml, sd_xl_base.yaml,
# sd_xl_refiner.yaml of the authors' repositories.
_SD: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2}
ORIGINAL: Mapping[str, dict[str, Any]] = {
    "sd1": {
        **_SD,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "transformer_depth": 1,
        "context_dim": 768,
    },
    "sd2": {
        **_SD,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": 1,
        "context_dim": 1024,
    },
    "sdxl": {
        **_SD,
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10],
        "context_dim": 2048,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
    "refiner": {
        **_SD,
        "model_channels": 384,
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": 4,
        "context_dim": [1280, 1280, 1280, 1280],
        "num_classes": "sequential",
        "adm_in_channels": 2560,
    },
}
VAE: dict[str, Any] = {
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "in_channels": 3,
    "out_ch": 3,
    "z_channels": 4,
}
# Millions of parameters of the text towers, from OpenCLIP's docs/model_profile.csv: ViT-L-14, ViT-H-14, ViT-bigG-14.
TOWERS = {"sd1": 123.65, "sd2": 354.03, "sdxl": 694.66, "refiner": 694.66}


def their_modules(kind: str) -> dict[str, Any]:
    """The published model as diffusers makes it from the original configuration, without weights."""
    original = {
        "model": {
            "params": {"unet_config": {"params": ORIGINAL[kind]}, "first_stage_config": {"params": {"ddconfig": VAE}}}
        }
    }
    # The checkpoint serves to find the size of the picture, which does not matter here.
    unet = theirs.create_unet_diffusers_config_from_ldm(original, {}, image_size=512)
    vae = theirs.create_vae_diffusers_config_from_ldm(original, {}, image_size=512)
    with torch.device("meta"):
        return {"unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(**vae)}


def published(kind: str) -> Published:
    """What we know of a published model."""
    names = {"sd1": "stable_diffusion_1", "sd2": "stable_diffusion_2", "sdxl": "stable_diffusion_xl"}
    module = importlib.import_module("latentrt.exporter.source.single_file_configs")
    found = getattr(module, names.get(kind, "stable_diffusion_xl_refiner"))("epsilon")
    assert isinstance(found, Published)
    return found


@pytest.mark.parametrize("kind", ORIGINAL)
@pytest.mark.filterwarnings("ignore:.*image_size.*:FutureWarning")
def test_published_models(original_layout: Any, kind: str) -> None:
    """A file with the names and shapes of a published model is recognised, and every tensor has its place."""
    parts = their_modules(kind)
    known = published(kind)
    with torch.device("meta"):
        for name, config in known.configs.items():
            if name.startswith("text"):
                model = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
                parts[name] = model(CLIPTextConfig(**config))
        tensors = original_layout.tensors(kind, parts)
    header = Header(Path(f"{kind}.safetensors"), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {})
    found, notes = recognise(header)
    assert found.title == known.title
    assert known.title in notes[0]
    for name in ("unet", "vae"):
        ours = {key: value for key, value in parts[name].config.items() if key in found.configs[name]}
        assert {key: _listed(value) for key, value in ours.items() if key not in _OWN} == {
            key: value for key, value in found.configs[name].items() if key in ours and key not in _OWN
        }
    prefix = {"sd1": "cond_stage_model.transformer", "sdxl": "conditioner.embedders.1.model"}.get(
        kind, "conditioner.embedders.0.model" if kind == "refiner" else "cond_stage_model.model"
    )
    held = [tensor.numel() for key, tensor in tensors.items() if key.startswith(prefix) and "position_ids" not in key]
    projection = 768 * 768 if kind == "sd1" else 0  # which transformers' CLIPTextModel does not have
    assert (sum(held) + projection) / 1e6 == pytest.approx(TOWERS[kind], abs=0.006)
    if found.index["_class_name"] in PIPELINES:
        SingleFileWeights(header, PIPELINES[found.index["_class_name"]], found.configs, "")


# Sizes of pictures, and what only half precision and scaling are about.
_OWN = ("sample_size", "scaling_factor", "upcast_attention")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_scaling_of_latents() -> None:
    """Latents are scaled as the original configurations say."""
    scaling = {kind: published(kind).configs["vae"]["scaling_factor"] for kind in ORIGINAL}
    assert scaling == {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025, "refiner": 0.13025}
