"""The three networks, the tokenizer and the scheduler of the emoji model, as diffusers classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MERGES = 1200
"""BPE merges learnt from the captions, beside the 512 byte tokens and the two special ones."""
LATENT_CHANNELS = 8
WIDTH = 128
"""Width of the text encoder, and so of cross-attention."""


def new_vae() -> AutoencoderKL:
    """AutoencoderKL with a downsampling factor of 4: 64x64x3 pixels to 16x16x8 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=64,
        mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    """UNet2DConditionModel on 16x16x8 latents, with cross-attention at 8x8 and 4x4 alone."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    """CLIPTextModel with two layers; the two highest token ids are start and end of text."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=WIDTH,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def train_tokenizer(captions: list[str], directory: Path) -> CLIPTokenizer:
    """Learn BPE merges from ``captions`` and write a CLIP tokenizer (same layout as OpenAI's) to ``directory``."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=512 + MERGES, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:MERGES]
    tokens = [*alphabet, *(character + "</w>" for character in alphabet)]
    tokens += [token for token in dict.fromkeys(a + b for a, b in merges) if token not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(directory / "vocab.json"), merges=str(directory / "merges.txt"), model_max_length=77
    )
    tokenizer.save_pretrained(str(directory))
    return tokenizer


def new_scheduler(**overrides: Any) -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule with v prediction; DPM-Solver++ (2M) as the default sampler."""
    settings: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    return DPMSolverMultistepScheduler(**{**settings, **overrides})
