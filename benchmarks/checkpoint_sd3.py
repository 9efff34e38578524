"""A Stable Diffusion 3.5 checkpoint of random weights in fp16, without T5: no copy in fp32 is ever made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .random_weights import write_weights

SIZES = ("sd35-medium", "tiny")
"""What can be written: the size of the real model, and one for tests."""

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
_TEXT: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd35-medium": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"projection_dim": 768},
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        | {"projection_dim": 1280},
    ),
    "tiny": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"projection_dim": 16},
        {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"projection_dim": 24},
    ),
}
_VAE: Mapping[str, dict[str, Any]] = {
    "sd35-medium": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    "tiny": {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 32},
}
_LATENTS = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
_VOCABULARY = {"sd35-medium": 49408}


def write_sd3(directory: Path, size: str, tokenizer: Path, seed: int = 0) -> None:
    """Write a diffusers directory of fp16 safetensors, in shards of a gigabyte.

    Args:
        directory: Where to.
        size: One of :data:`SIZES`.
        tokenizer: Directory of a CLIP tokenizer.
        seed: Of the weights.
    """
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(directory / "scheduler")
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline"}
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {name: [None, None] for name in ("text_encoder_3", "tokenizer_3")}
    for suffix, settings, activation in zip(("", "_2"), _TEXT[size], ("quick_gelu", "gelu"), strict=True):
        words = CLIPTokenizer.from_pretrained(tokenizer)
        config = CLIPTextConfig(
            vocab_size=_VOCABULARY.get(size, len(words)),
            **settings,
            hidden_act=activation,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=1,
            architectures=["CLIPTextModelWithProjection"],
            dtype="float16",
        )
        if suffix:
            words.pad_token = words.convert_ids_to_tokens(0)
        words.save_pretrained(directory / f"tokenizer{suffix}")
        with torch.device("meta"):  # shapes without memory
            text = CLIPTextModelWithProjection(config)
        config.save_pretrained(directory / f"text_encoder{suffix}")
        write_weights(directory / f"text_encoder{suffix}", "model", text, generator)
        index[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection"]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    vae = {**_VAE[size], **_LATENTS, "use_quant_conv": False, "use_post_quant_conv": False}
    vae["down_block_types"] = ("DownEncoderBlock2D",) * len(vae["block_out_channels"])
    vae["up_block_types"] = ("UpDecoderBlock2D",) * len(vae["block_out_channels"])
    for name, part, config in (
        ("transformer", SD3Transformer2DModel, TRANSFORMER[size]),
        ("vae", AutoencoderKL, vae),
    ):
        with torch.device("meta"):
            model = part(**config)
        model.save_config(directory / name)
        write_weights(directory / name, "diffusion_pytorch_model", model, generator)
        index[name] = ["diffusers", part.__name__]
    (directory / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
