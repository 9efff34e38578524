"""A Stable Diffusion XL checkpoint of random weights in fp16, drawn tensor by tensor: no copy in fp32 is ever made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .parts import write_denoiser_and_vae, write_texts

SIZES = ("sdxl", "tiny")
"""What can be written: the size of the real model, and one for tests."""

# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0: the config.json of each part.
_UNET: dict[str, dict[str, Any]] = {
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
    "tiny": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "layers_per_block": 1,
        "cross_attention_dim": 32 + 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}
_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def write_sdxl(directory: Path, size: str, tokenizer: Path, seed: int = 0) -> None:
    """Write a diffusers directory of fp16 safetensors, in shards of a gigabyte.

    Args:
        directory: Where to.
        size: One of :data:`SIZES`.
        tokenizer: Directory of a CLIP tokenizer.
        seed: Of the weights.
    """
    import torch
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    EulerDiscreteScheduler(**_SCHEDULER, timestep_spacing="leading").save_pretrained(directory / "scheduler")
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    index |= {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    index |= write_texts(directory, size, tokenizer, (CLIPTextModel, CLIPTextModelWithProjection), generator)
    unet = ("unet", UNet2DConditionModel, {**_UNET[size], **_BLOCKS})
    index |= write_denoiser_and_vae(directory, size, unet, {"scaling_factor": 0.13025}, generator)
    (directory / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
