"""A Stable Diffusion XL checkpoint of random weights in fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .parts import Pipeline, write_pipeline

SIZES = ("sdxl", "tiny")
"""Sizes that can be written: that of the real model, and one for tests."""

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
    """Write a checkpoint; arguments as for :func:`~latentrt.benchmarks.checkpoints.parts.write_pipeline`."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    pipeline = Pipeline(
        "StableDiffusionXLPipeline",
        EulerDiscreteScheduler(**_SCHEDULER, timestep_spacing="leading"),
        (CLIPTextModel, CLIPTextModelWithProjection),
        ("unet", UNet2DConditionModel, {**_UNET[size], **_BLOCKS}),
        {"scaling_factor": 0.13025},
        {"force_zeros_for_empty_prompt": True},
    )
    write_pipeline(directory, pipeline, size, tokenizer, seed)
