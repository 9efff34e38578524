"""What checkpoints of random weights in fp16 have in common: CLIP's two text encoders with tokenizers, and the VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .random_weights import write_weights

if TYPE_CHECKING:
    import torch

# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0: the config.json of each part; those of Stable
# Diffusion 3.5 are the same.
_REAL: tuple[dict[str, int], dict[str, int]] = (
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"projection_dim": 768, "vocab_size": 49408},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    | {"projection_dim": 1280, "vocab_size": 49408},
)
_TINY: tuple[dict[str, int], dict[str, int]] = (
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"projection_dim": 16},
    {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"projection_dim": 24},
)
_REAL_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
}
_TINY_VAE: Mapping[str, Any] = {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 32}

Index = dict[str, list[str | None]]
"""Entries of ``model_index.json``."""


def write_texts(
    directory: Path, size: str, tokenizer: Path, classes: Sequence[type], generator: torch.Generator
) -> Index:
    """Write two text encoders, with a tokenizer for each; the second pads with another token.

    Args:
        directory: The checkpoint.
        size: ``tiny``, or any other for that of the real models.
        tokenizer: Directory of a CLIP tokenizer.
        classes: transformers' class of each encoder.
        generator: Weights are drawn from it.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTokenizer

    index: Index = {}
    sizes = _TINY if size == "tiny" else _REAL
    for suffix, settings, kind, activation in zip(("", "_2"), sizes, classes, ("quick_gelu", "gelu"), strict=True):
        words = CLIPTokenizer.from_pretrained(tokenizer)
        config = CLIPTextConfig(
            **{"vocab_size": len(words), **settings},
            hidden_act=activation,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=1,
            architectures=[kind.__name__],
            dtype="float16",
        )
        if suffix:
            words.pad_token = words.convert_ids_to_tokens(0)
        words.save_pretrained(directory / f"tokenizer{suffix}")
        with torch.device("meta"):  # shapes without memory
            model = kind(config)
        config.save_pretrained(directory / f"text_encoder{suffix}")
        write_weights(directory / f"text_encoder{suffix}", "model", model, generator)
        index[f"text_encoder{suffix}"] = ["transformers", kind.__name__]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    return index


def write_denoiser_and_vae(
    directory: Path,
    size: str,
    denoiser: tuple[str, type, Mapping[str, Any]],
    vae: Mapping[str, Any],
    generator: torch.Generator,
) -> Index:
    """Write a denoiser and a VAE.

    Args:
        directory: The checkpoint.
        size: ``tiny``, or any other for that of the real models.
        denoiser: Name of its folder, diffusers' class, and settings.
        vae: Settings of the VAE beside its size.
        generator: Weights are drawn from it.
    """
    import torch
    from diffusers import AutoencoderKL

    sizes = _TINY_VAE if size == "tiny" else _REAL_VAE
    levels = len(sizes["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    index: Index = {}
    for name, kind, config in (denoiser, ("vae", AutoencoderKL, {**sizes, **vae, **blocks})):
        with torch.device("meta"):
            model = kind(**config)
        model.save_config(directory / name)
        write_weights(directory / name, "diffusion_pytorch_model", model, generator)
        index[name] = ["diffusers", kind.__name__]
    return index
