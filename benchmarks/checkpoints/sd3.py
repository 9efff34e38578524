"""A Stable Diffusion 3.5 checkpoint of random weights in fp16, without T5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .parts import Pipeline, write_pipeline

SIZES = ("sd35-medium", "tiny")
"""Sizes that can be written: that of the real model, and one for tests."""

# https://huggingface.co/stabilityai/stable-diffusion-3.5-medium: the config.json of each part.
TRANSFORMER: Mapping[str, dict[str, Any]] = {
    "sd35-medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768 + 1280,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "tiny": {
        "sample_size": 16,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "caption_projection_dim": 32,
        "joint_attention_dim": 96,
        "pooled_projection_dim": 16 + 24,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
}
"""Configurations of the denoiser by size."""

_LATENTS = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
_VAE = {**_LATENTS, "use_quant_conv": False, "use_post_quant_conv": False}


def write_sd3(directory: Path, size: str, tokenizer: Path, seed: int = 0) -> None:
    """Write a checkpoint; arguments as for :func:`~latentrt.benchmarks.checkpoints.parts.write_pipeline`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    pipeline = Pipeline(
        "StableDiffusion3Pipeline",
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        (CLIPTextModelWithProjection, CLIPTextModelWithProjection),
        ("transformer", SD3Transformer2DModel, TRANSFORMER[size]),
        _VAE,
        {part: [None, None] for part in ("text_encoder_3", "tokenizer_3")},
    )
    write_pipeline(directory, pipeline, size, tokenizer, seed)
