"""Diffusers directories of seeded random weights, with the layout of real checkpoints: one function a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "emoji" / "tokenizer"
BETAS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _clip(tokenizer: CLIPTokenizer, kind: Any = CLIPTextModel, width: int = 32, **settings: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return kind(config).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=32,
    ).eval()


def stable_diffusion(path: Path, *, modern: bool) -> None:
    """SD 1.x: epsilon prediction, heads of one number in all blocks, PNDM scheduler.

    ``modern`` is SD 2.x: v prediction, heads by block, linear projections, GELU text encoder, DDIM scheduler.
    """
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = _clip(tokenizer, hidden_act="gelu" if modern else "quick_gelu")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=[2, 4] if modern else 4,
        use_linear_projection=modern,
        norm_num_groups=8,
    )
    schedule = {**BETAS, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = (
        DDIMScheduler(**schedule, clip_sample=False, prediction_type="v_prediction")
        if modern
        else PNDMScheduler(**schedule, skip_prk_steps=True)
    )
    StableDiffusionPipeline(
        text_encoder=text,
        unet=unet.eval(),
        vae=_vae(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path, safe_serialization=True)


def lcm_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net that takes guidance in, which a random one would hardly heed."""
    unet.time_embedding.cond_proj.weight.data *= 8
    return unet.eval()


def latent_consistency(path: Path) -> None:
    """A latent consistency model of SD 1.x."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        time_cond_proj_dim=16,
    )
    LatentConsistencyModelPipeline(
        text_encoder=_clip(tokenizer, hidden_act="quick_gelu"),
        unet=lcm_weights(unet),
        vae=_vae(),
        tokenizer=tokenizer,
        scheduler=LCMScheduler(**BETAS, set_alpha_to_one=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path, safe_serialization=True)


def stable_diffusion_xl(path: Path, *, consistent: bool = False) -> None:
    """SDXL: two text encoders of different widths, the second padding with another token, transformers by level.

    ``consistent`` is a latent consistency model of it.
    """
    tokenizer, tokenizer_2 = (CLIPTokenizer.from_pretrained(TOKENIZER) for _ in range(2))
    tokenizer_2.pad_token = tokenizer_2.convert_ids_to_tokens(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=32 + 48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        norm_num_groups=8,
        time_cond_proj_dim=17 if consistent else None,
    )
    for weight in unet.add_embedding.parameters():
        weight.data *= 4  # or sizes would hardly change a picture
    StableDiffusionXLPipeline(
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer_2, CLIPTextModelWithProjection, width=48, hidden_act="gelu", projection_dim=24),
        unet=lcm_weights(unet) if consistent else unet.eval(),
        vae=_vae(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=LCMScheduler(**BETAS)
        if consistent
        else EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(path, safe_serialization=True)


def stable_diffusion_xl_refiner(path: Path) -> None:
    """SDXL's refiner: the second text encoder alone, attention in the middle levels, a score in place of a size."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 24,
        norm_num_groups=8,
    )
    for weight in unet.add_embedding.parameters():
        weight.data *= 4  # as for the base
    StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        text_encoder_2=_clip(tokenizer, CLIPTextModelWithProjection, width=48, hidden_act="gelu", projection_dim=24),
        unet=unet.eval(),
        vae=_vae(),
        tokenizer=None,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(path, safe_serialization=True)


def tiny_vae(path: Path, factor: int = 2, seed: int = 0) -> Path:
    """An AutoencoderTiny for the latents of the models here, with a scale of its own."""
    torch.manual_seed(seed)
    levels = factor.bit_length()
    AutoencoderTiny(
        encoder_block_out_channels=(16,) * levels,
        decoder_block_out_channels=(16,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
        scaling_factor=0.8,
        shift_factor=0.1,
    ).save_pretrained(path, safe_serialization=True)
    return path


WRITERS: Mapping[str, Callable[[Path], None]] = {
    "sd1": lambda path: stable_diffusion(path, modern=False),
    "sd2": lambda path: stable_diffusion(path, modern=True),
    "lcm": latent_consistency,
    "sdxl": stable_diffusion_xl,
    "sdxl-lcm": lambda path: stable_diffusion_xl(path, consistent=True),
    "sdxl-refiner": stable_diffusion_xl_refiner,
}


WITH_TINY_VAE = {"lcm"}
"""Kinds whose bundles get a tiny decoder too."""


def write(path: Path, kind: str, seed: int = 0) -> Path:
    """Write a source of random weights.

    Args:
        path: Where to.
        kind: A key of :data:`WRITERS`.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    WRITERS[kind](path)
    return path
