"""Parts that families share, and the components that are made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentrt.engines.trt import Range
from latentrt.runtime.text.chunks import MOST_CHUNKS

from ..components import Checkpoint, Component, Decoder, Encoder
from .base import Config, Part, latent_factor

LATENT_AXES = {0: "batch", 2: "latent_height", 3: "latent_width"}
"""Dimensions of latents that vary."""
LENGTH, TEXT_LENGTH, EMBEDDINGS = "length", "text_length", "embeddings"
"""Names of other lengths that vary: tokens that T5 takes, states of a prompt that a denoiser takes, and vectors that a
CLIP text encoder takes in addition to those of its table."""
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_IMAGE_AXES = {0: "batch", 2: "height", 3: "width"}


def clip_names(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Give CLIP's tensors the names of the installed transformers, which has them with or without ``text_model.``."""
    expected = set(module.state_dict())
    renamed = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("text_model.")
        if bare != "embeddings.position_ids":  # a constant that old checkpoints stored
            renamed[next((known for known in (bare, f"text_model.{bare}") if known in expected), name)] = tensor
    return renamed


def vae_names(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Give the attention of an autoencoder its present names; the first checkpoints of diffusers have older ones."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "attentions" in parts and len(parts) > 1:
            parts[-2] = _OLD_ATTENTION.get(parts[-2], parts[-2])
        renamed[".".join(parts)] = tensor
    return renamed


CLIP_TEXT = Part(
    ("CLIPTextModel",),
    "model",
    lambda config: CLIPTextModel(CLIPTextConfig(**known(config, CLIPTextConfig))),
    clip_names,
)
UNET = Part(
    ("UNet2DConditionModel",),
    "diffusion_pytorch_model",
    lambda config: UNet2DConditionModel(**known(config, UNet2DConditionModel)),
)
VAE = Part(
    ("AutoencoderKL",),
    "diffusion_pytorch_model",
    lambda config: AutoencoderKL(**known(config, AutoencoderKL)),
    vae_names,
)
LCM_DEFAULTS = (4, 8.5)
"""Steps and guidance scale of latent consistency models, as in diffusers."""
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

_EXAMPLE_EMBEDDINGS = 3
_SWITCHES = {
    *("torch_dtype", "dtype", "attn_implementation", "quantization_config", "auto_map", "use_safetensors"),
    *("return_dict", "torchscript", "output_attentions", "output_hidden_states"),
}


def known(config: Config, factory: Any) -> dict[str, Any]:
    """Entries of a configuration that are parameters of a constructor, without private ones and library switches."""
    names = {name for name, p in inspect.signature(factory).parameters.items() if p.kind is not p.VAR_KEYWORD}
    names |= set(getattr(factory, "__annotations__", {}))
    return {key: value for key, value in config.items() if key in names - _SWITCHES and not key.startswith("_")}


def autoencoder(checkpoint: Checkpoint, name: str, generator: torch.Generator) -> Component:
    """The component ``vae_decoder`` or ``vae_encoder``, with an example drawn from ``generator``."""
    model, vae = checkpoint.load("vae"), checkpoint.configs["vae"]
    if name == "vae_decoder":
        latents = torch.randn(2, int(vae.get("latent_channels", 4)), 8, 12, generator=generator)
        return Component(name, Decoder(model), {"latent_sample": latents}, {"latent_sample": LATENT_AXES}, ("sample",))
    factor = latent_factor(vae)
    pixels = torch.rand(2, 3, 8 * factor, 12 * factor, generator=generator) * 2 - 1
    return Component(name, Encoder(model), {"sample": pixels}, {"sample": _IMAGE_AXES}, ("latent_parameters",))


def text_encoder(
    checkpoint: Checkpoint,
    name: str,
    wrapper: Callable[[nn.Module], nn.Module],
    outputs: Sequence[str],
    generator: torch.Generator,
) -> Component:
    """The component of a CLIP text encoder, with an example drawn from ``generator``.

    Args:
        checkpoint: The model.
        name: The text encoder.
        wrapper: Makes the module to export of the text encoder.
        outputs: Names of the module's outputs.
        generator: Ids and added vectors are drawn from it.
    """
    config = checkpoint.configs[name]
    length, width = _clip_length(config), int(config.get("hidden_size", 512))
    ids = torch.randint(int(config.get("vocab_size", 49408)), (2, length), generator=generator)
    first = length // 2
    ids[:, first : first + _EXAMPLE_EMBEDDINGS] = -1 - torch.arange(min(_EXAMPLE_EMBEDDINGS, length - first))
    vectors = torch.randn(_EXAMPLE_EMBEDDINGS, width, generator=generator)
    return Component(
        name,
        wrapper(checkpoint.load(name)),
        {"input_ids": ids, "extra_embeddings": vectors},
        {"input_ids": {0: "batch"}, "extra_embeddings": {0: EMBEDDINGS}},
        tuple(outputs),
    )


def _clip_length(config: Config) -> int:
    """Tokens that a CLIP text encoder takes at once."""
    return int(config.get("max_position_embeddings", 77))


def clip_ranges(checkpoint: Checkpoint, name: str) -> Mapping[str, Range]:
    """Ranges of lengths where CLIP alone encodes prompts: of states in chunks, and of added vectors.

    Args:
        checkpoint: The model.
        name: One of its CLIP text encoders.
    """
    length = _clip_length(checkpoint.configs[name])
    return {TEXT_LENGTH: Range(length, length, MOST_CHUNKS * length), **embedding_ranges(checkpoint, name)}


def embedding_ranges(checkpoint: Checkpoint, name: str) -> Mapping[str, Range]:
    """Range of the number of vectors that are added to a CLIP text encoder: up to one for each token."""
    return {EMBEDDINGS: Range(1, 1, _clip_length(checkpoint.configs[name]))}


def unet_inputs(checkpoint: Checkpoint, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Example inputs that every U-Net has.

    Args:
        checkpoint: The model.
        length: Tokens of a prompt.
        generator: The inputs are drawn from it.
    """
    unet = checkpoint.configs["unet"]
    # A side that does not halve evenly: then the U-Net passes the size of each skip connection to the upsampling that
    # meets it, and the graph serves every size rather than multiples of that factor alone.
    side = 2 * 2 ** (len(unet["block_out_channels"]) - 1) + 1
    width = int(unet.get("cross_attention_dim", 1280))
    latents = int(checkpoint.configs["vae"].get("latent_channels", 4))
    masks = int(unet.get("in_channels", 4)) - latents  # the mask, and latents of the masked image
    inpaint = {"inpaint": torch.randn(2, masks, side, side + 2, generator=generator)} if masks else {}
    return {
        "sample": torch.randn(2, latents, side, side + 2, generator=generator),
        **inpaint,
        "timestep": torch.rand(2, generator=generator) * 999,
        "encoder_hidden_states": torch.randn(2, length, width, generator=generator),
    }


def guidance_input(checkpoint: Checkpoint, generator: torch.Generator) -> dict[str, Tensor]:
    """Example of the embedded guidance scale, the last input of a U-Net that takes it; empty for any other U-Net."""
    width = checkpoint.configs["unet"].get("time_cond_proj_dim")
    return {} if width is None else {"timestep_cond": torch.rand(2, int(width), generator=generator) * 2 - 1}


def guidance_kind(checkpoint: Checkpoint) -> str:
    """How a U-Net is guided: one of :data:`latentrt.runtime.families.base.GUIDANCE`."""
    return "classifier-free" if checkpoint.configs["unet"].get("time_cond_proj_dim") is None else "embedded"


def denoiser_axes(example: Mapping[str, Tensor]) -> dict[str, Mapping[int, str]]:
    """Dimensions of variable length of a denoiser's inputs: rows, sides of latents, and length of the prompt."""
    own = {"sample": LATENT_AXES, "inpaint": LATENT_AXES, "encoder_hidden_states": {0: "batch", 1: TEXT_LENGTH}}
    return {name: own.get(name, {0: "batch"}) for name in example}
