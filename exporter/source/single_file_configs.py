"""Configurations of the published models whose checkpoints come in a single file without configurations.

Facts: the configuration files beside the original checkpoints (CompVis/stable-diffusion ``v1-inference.yaml``,
Stability-AI/stablediffusion ``v2-inference-v.yaml``, Stability-AI/generative-models ``sd_xl_base.yaml`` and
``sd_xl_refiner.yaml``), and of the text encoders OpenAI's CLIP ViT-L/14 and OpenCLIP's ViT-H/14 and ViT-bigG/14.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FIRST = "!"
"""Token of id 0, with which OpenCLIP pads."""


@dataclass(frozen=True)
class Published:
    """A published model, but for its weights.

    Attributes:
        title: Its name in messages.
        index: Contents of ``model_index.json``.
        configs: ``config.json`` by part.
        scheduler: ``scheduler_config.json``.
        padding: Tokenizers, with the token to pad with where that is not the tokenizer's own.
    """

    title: str
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    padding: Mapping[str, str | None]


def _clip(width: int, layers: int, heads: int, act: str, projection: int) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "projection_dim": projection,
        "bos_token_id": 0,
        "eos_token_id": 2,  # transformers then takes the highest id for the end, as CLIP's end token has it
        "pad_token_id": 1,
    }


_VIT_L = _clip(768, 12, 12, "quick_gelu", 768)
_VIT_H = _clip(1024, 23, 16, "gelu", 512)  # of 24 layers, without the last
_VIT_BIG_G = _clip(1280, 32, 20, "gelu", 1280)


def _vae(scaling: float, side: int) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": side,
        "scaling_factor": scaling,
    }


def _unet(side: int, widths: list[int], heads: int | list[int], context: int, attends: str) -> dict[str, Any]:
    """``attends`` says of each level, from the image's size down, whether it has attention."""
    levels = [letter == "x" for letter in attends]
    return {
        "sample_size": side // 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(levels)],
        "layers_per_block": 2,
        "cross_attention_dim": context,
        # The number of heads, whatever diffusers calls it.
        "attention_head_dim": heads,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_CLASSIC = {**_BETAS, "set_alpha_to_one": False}


def _index(pipeline: str, *names: str, **more: Any) -> dict[str, Any]:
    classes = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return {"_class_name": pipeline, **{name: classes[name] for name in (*names, "unet", "vae")}, **more}


def stable_diffusion_1(prediction: str) -> Published:
    """Stable Diffusion 1.x."""
    return Published(
        "Stable Diffusion 1.x",
        _index("StableDiffusionPipeline", "text_encoder", "tokenizer"),
        {
            "text_encoder": _VIT_L,
            "unet": _unet(512, [320, 640, 1280, 1280], 8, 768, "xxx-"),
            "vae": _vae(0.18215, 512),
        },
        {"_class_name": "PNDMScheduler", **_CLASSIC, "skip_prk_steps": True, "prediction_type": prediction},
        {"tokenizer": None},
    )


def stable_diffusion_2(prediction: str) -> Published:
    """Stable Diffusion 2.x: of 768 pixels where it predicts velocity, else of 512."""
    velocity = prediction == "v_prediction"
    unet = _unet(768 if velocity else 512, [320, 640, 1280, 1280], [5, 10, 20, 20], 1024, "xxx-")
    return Published(
        "Stable Diffusion 2.x",
        _index("StableDiffusionPipeline", "text_encoder", "tokenizer"),
        {
            "text_encoder": _VIT_H,
            # Products of queries and keys of 2.1 at 768 pixels leave the range of half precision.
            "unet": {**unet, "use_linear_projection": True, "upcast_attention": velocity},
            "vae": _vae(0.18215, 768),
        },
        {"_class_name": "DDIMScheduler", **_CLASSIC, "clip_sample": False, "prediction_type": prediction},
        {"tokenizer": _FIRST},
    )


def stable_diffusion_xl(prediction: str) -> Published:
    """Stable Diffusion XL, base."""
    unet = _unet(1024, [320, 640, 1280], [5, 10, 20], 2048, "-xx")
    return Published(
        "Stable Diffusion XL base",
        _index(
            *("StableDiffusionXLPipeline", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
            force_zeros_for_empty_prompt=True,
        ),
        {
            "text_encoder": _VIT_L,
            "text_encoder_2": _VIT_BIG_G,
            "unet": {**unet, "transformer_layers_per_block": [1, 2, 10], **_sizes(1280 + 6 * 256)},
            "vae": _vae(0.13025, 1024),
        },
        {"_class_name": "EulerDiscreteScheduler", **_BETAS, "prediction_type": prediction},
        {"tokenizer": None, "tokenizer_2": _FIRST},
    )


def stable_diffusion_xl_refiner(prediction: str) -> Published:
    """Stable Diffusion XL, refiner."""
    unet = _unet(1024, [384, 768, 1536, 1536], [6, 12, 24, 24], 1280, "-xx-")
    return Published(
        "Stable Diffusion XL refiner",
        _index(
            *("StableDiffusionXLImg2ImgPipeline", "text_encoder_2", "tokenizer_2"),
            text_encoder=[None, None],
            tokenizer=[None, None],
            force_zeros_for_empty_prompt=False,
            requires_aesthetics_score=True,
        ),
        {
            "text_encoder_2": _VIT_BIG_G,
            "unet": {**unet, "transformer_layers_per_block": 4, **_sizes(1280 + 5 * 256)},
            "vae": _vae(0.13025, 1024),
        },
        {"_class_name": "EulerDiscreteScheduler", **_BETAS, "prediction_type": prediction},
        {"tokenizer_2": _FIRST},
    )


def _sizes(width: int) -> dict[str, Any]:
    """Entries of SDXL's U-Net for sizes and crop, which it takes with the pooled text state."""
    return {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": width,
    }
