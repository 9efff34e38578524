"""A Stable Diffusion XL checkpoint of random weights in fp16, drawn tensor by tensor: no copy in fp32 is ever made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .random_weights import write_weights

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
_TEXT: dict[str, dict[str, int]] = {
    "sdxl": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
_TEXT_2: dict[str, dict[str, int]] = {
    "sdxl": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    | {"projection_dim": 1280},
    "tiny": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"projection_dim": 24},
}
_VAE: dict[str, dict[str, Any]] = {
    "sdxl": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    "tiny": {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 32},
}
_VOCABULARY = {"sdxl": 49408}
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
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    words = {}
    for name in ("tokenizer", "tokenizer_2"):
        words[name] = CLIPTokenizer.from_pretrained(tokenizer)
        if name == "tokenizer_2":
            words[name].pad_token = words[name].convert_ids_to_tokens(0)
        words[name].save_pretrained(directory / name)
    EulerDiscreteScheduler(**_SCHEDULER, timestep_spacing="leading").save_pretrained(directory / "scheduler")
    for name, kind, settings, activation in (
        ("text_encoder", CLIPTextModel, _TEXT, "quick_gelu"),
        ("text_encoder_2", CLIPTextModelWithProjection, _TEXT_2, "gelu"),
    ):
        config = CLIPTextConfig(
            vocab_size=_VOCABULARY.get(size, len(words["tokenizer"])),
            **settings[size],
            hidden_act=activation,
            bos_token_id=words["tokenizer"].bos_token_id,
            eos_token_id=words["tokenizer"].eos_token_id,
            pad_token_id=1,
            architectures=[kind.__name__],
            dtype="float16",
        )
        with torch.device("meta"):  # shapes without memory
            model = kind(config)
        config.save_pretrained(directory / name)
        write_weights(directory / name, "model", model, generator)
    vae = {**_VAE[size], "scaling_factor": 0.13025}
    vae["down_block_types"] = ("DownEncoderBlock2D",) * len(vae["block_out_channels"])
    vae["up_block_types"] = ("UpDecoderBlock2D",) * len(vae["block_out_channels"])
    for name, part, config in (
        ("unet", UNet2DConditionModel, {**_UNET[size], **_BLOCKS}),
        ("vae", AutoencoderKL, vae),
    ):
        with torch.device("meta"):
            model = part(**config)
        model.save_config(directory / name)
        write_weights(directory / name, "diffusion_pytorch_model", model, generator)
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in words}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
