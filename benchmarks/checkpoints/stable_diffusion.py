"""A Stable Diffusion 1.5 checkpoint of random weights in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/blob/main/unet/config.json; settings that are left
# out have diffusers' defaults.
_SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "tiny": _SD15
    | {
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
    },
}
"""Configurations of the U-Net by size."""

# The same model's text_encoder/config.json, vae/config.json and scheduler/scheduler_config.json.
_TEXT: dict[str, dict[str, Any]] = {
    "sd15": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
    },
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
_VAE: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
    "tiny": {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 32},
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}


def write_checkpoint(directory: Path, size: str, tokenizer: Path, seed: int = 0) -> None:
    """Write a diffusers directory of fp32 safetensors.

    Args:
        directory: The directory to write.
        size: A key of :data:`CONFIGS`.
        tokenizer: Directory of a CLIP tokenizer.
        seed: Seed of the weights, which are drawn as each class initialises them.
    """
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    blocks = len(_VAE[size]["block_out_channels"])
    text = CLIPTextConfig(
        **{"vocab_size": len(words), **_TEXT[size]},
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            **_VAE[size],
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet2DConditionModel(**CONFIGS[size]),
        scheduler=PNDMScheduler(**_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
