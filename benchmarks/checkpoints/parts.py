"""Parts that checkpoints of random weights in fp16 share: two text encoders with tokenizers, the VAE, and the index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

_Index = dict[str, Any]  # entries of model_index.json


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of diffusers' whose checkpoint is to be written.

    Attributes:
        name: The pipeline's class.
        scheduler: The scheduler, made.
        encoders: transformers' classes of its two text encoders.
        denoiser: Name of the denoiser's folder, diffusers' class, and settings.
        vae: Settings of the VAE beside its size.
        index: Further entries of ``model_index.json``.
    """

    name: str
    scheduler: Any
    encoders: tuple[type, type]
    denoiser: tuple[str, type, Mapping[str, Any]]
    vae: Mapping[str, Any]
    index: Mapping[str, Any]


def write_pipeline(directory: Path, pipeline: Pipeline, size: str, tokenizer: Path, seed: int) -> None:
    """Write a diffusers directory of fp16 safetensors, in shards of a gigabyte.

    Args:
        directory: The directory to write.
        pipeline: The pipeline.
        size: ``"tiny"``, or any other for the size of the real models.
        tokenizer: Directory of a CLIP tokenizer.
        seed: Seed of the weights.
    """
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pipeline.scheduler.save_pretrained(directory / "scheduler")
    index: _Index = {"_class_name": pipeline.name, **pipeline.index}
    index["scheduler"] = ["diffusers", type(pipeline.scheduler).__name__]
    index |= _write_text_encoders(directory, size, tokenizer, pipeline.encoders, generator)
    index |= _write_denoiser_and_vae(directory, size, pipeline.denoiser, pipeline.vae, generator)
    (directory / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_text_encoders(
    directory: Path, size: str, tokenizer: Path, classes: Sequence[type], generator: torch.Generator
) -> _Index:
    """Write the text encoders, with a tokenizer for each; the second tokenizer pads with another token."""
    import torch
    from transformers import CLIPTextConfig, CLIPTokenizer

    index: _Index = {}
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


def _write_denoiser_and_vae(
    directory: Path,
    size: str,
    denoiser: tuple[str, type, Mapping[str, Any]],
    vae: Mapping[str, Any],
    generator: torch.Generator,
) -> _Index:
    """Write the denoiser and the VAE."""
    import torch
    from diffusers import AutoencoderKL

    sizes = _TINY_VAE if size == "tiny" else _REAL_VAE
    levels = len(sizes["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    index: _Index = {}
    for name, kind, config in (denoiser, ("vae", AutoencoderKL, {**sizes, **vae, **blocks})):
        with torch.device("meta"):
            model = kind(**config)
        model.save_config(directory / name)
        write_weights(directory / name, "diffusion_pytorch_model", model, generator)
        index[name] = ["diffusers", kind.__name__]
    return index
