"""Names of tensors in checkpoints of the original layout, and where they go in diffusers' modules.

The original layout is that of CompVis' latent-diffusion and Stability's generative-models: U-Net blocks are numbered
through (``input_blocks.4.1``), OpenCLIP keeps query, key and value of an attention in one matrix, and attention of the
autoencoder is made of 1x1 convolutions. The numbers of blocks follow from diffusers' configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """Where (a part of) a tensor goes.

    Attributes:
        name: Its name in the module.
        change: Makes the module's tensor of the file's.
    """

    name: str
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor


Names = Callable[[str, Config], list[Target] | None]
"""Gives the targets of a tensor by its name, without the prefix of its part, and by the part's configuration: ``[]`` if
the tensor is not needed, ``None`` if the layout has no such name."""

_RESNET_OF_UNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESNET_OF_VAE = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION_OF_VAE = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LAYER_OF_OPENCLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_REST_OF_OPENCLIP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPENCLIP_LAYER = re.compile(r"transformer\.resblocks\.(0|[1-9][0-9]{0,3})\.(.+)")


def unet(name: str, config: Config) -> list[Target] | None:
    """Targets of a U-Net's tensors, ``model.diffusion_model``."""
    block, leaf, kind = _split(name, _unet_blocks(config))
    if block is None:
        return None
    if ".resnets." in block:
        inner = _RESNET_OF_UNET.get(leaf)
        return None if inner is None else [Target(f"{block}.{inner}.{kind}")]
    return [Target(f"{block}.{leaf}.{kind}" if leaf else f"{block}.{kind}")]


def vae(name: str, config: Config) -> list[Target] | None:
    """Targets of a VAE's tensors, ``first_stage_model``."""
    block, leaf, kind = _split(name, _vae_blocks(config))
    if block is None:
        return None
    inside = _RESNET_OF_VAE if ".resnets." in block else _ATTENTION_OF_VAE if ".attentions." in block else {"": ""}
    if leaf not in inside:
        return None
    target = ".".join(part for part in (block, inside[leaf], kind) if part)
    return [Target(target, _matrix) if ".attentions." in block else Target(target)]


def clip(name: str, config: Config) -> list[Target] | None:
    """Targets of a CLIP text encoder of transformers, whose names did not change."""
    return [Target(name)]


def openclip(name: str, config: Config) -> list[Target] | None:
    """Targets of a text encoder of OpenCLIP whose projection is not used."""
    return [] if name == "text_projection" else openclip_projected(name, config)


def openclip_projected(name: str, config: Config) -> list[Target] | None:
    """Targets of a text encoder of OpenCLIP with its projection, which transformers has transposed."""
    if name in ("logit_scale", "attn_mask"):
        return []
    if name == "text_projection":
        return [Target("text_projection.weight", lambda tensor: tensor.T.contiguous())]
    if name in _REST_OF_OPENCLIP:
        return [Target(_REST_OF_OPENCLIP[name])]
    if not (found := _OPENCLIP_LAYER.fullmatch(name)):
        return None
    layer, inner, layers = int(found[1]), found[2], int(config.get("num_hidden_layers", 12))
    if layer == layers:
        return []  # SD 2.x takes the states that enter the last layer, which diffusers therefore leaves out
    target = f"encoder.layers.{layer}"
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = inner.rpartition("_")[2]
        return [Target(f"{target}.self_attn.{each}_proj.{kind}", _third(i)) for i, each in enumerate("qkv")]
    module, _, kind = inner.rpartition(".")
    return [Target(f"{target}.{_LAYER_OF_OPENCLIP[module]}.{kind}")] if module in _LAYER_OF_OPENCLIP else None


def _third(index: int) -> Callable[[Tensor], Tensor]:
    """Cuts query, key or value, by index, out of a matrix that has all three."""

    def cut(tensor: Tensor) -> Tensor:
        width = len(tensor) // 3
        return tensor[index * width : (index + 1) * width].contiguous()

    return cut


def _matrix(tensor: Tensor) -> Tensor:
    """The matrix of a 1x1 convolution."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _split(name: str, blocks: Mapping[str, str]) -> tuple[str | None, str, str]:
    """The diffusers block that a name begins with, what follows, and ``weight`` or ``bias``."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        if block := blocks.get(".".join(parts[:count])):
            return block, ".".join(parts[count:]), kind
    return None, "", kind


def _unet_blocks(config: Config) -> dict[str, str]:
    """Blocks of a U-Net by their original names, with those of diffusers."""
    down, up = (list(config[f"{side}_block_types"]) for side in ("down", "up"))
    layers = config.get("layers_per_block", 2)
    each = list(layers) if isinstance(layers, list | tuple) else [layers] * len(down)
    blocks = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    number = 1
    for level, (kind, count) in enumerate(zip(down, each, strict=False)):
        for layer in range(count):
            blocks[f"input_blocks.{number}.0"] = f"down_blocks.{level}.resnets.{layer}"
            if "CrossAttn" in kind:
                blocks[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if level + 1 < len(down):
            blocks[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    number = 0
    for level, (kind, count) in enumerate(zip(up, reversed(each), strict=False)):
        for layer in range(count + 1):
            blocks[f"output_blocks.{number}.0"] = f"up_blocks.{level}.resnets.{layer}"
            if "CrossAttn" in kind:
                blocks[f"output_blocks.{number}.1"] = f"up_blocks.{level}.attentions.{layer}"
            if layer == count and level + 1 < len(up):
                last = 2 if "CrossAttn" in kind else 1
                blocks[f"output_blocks.{number}.{last}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            number += 1
    return blocks


def _vae_blocks(config: Config) -> dict[str, str]:
    """Blocks of an autoencoder by their original names, with those of diffusers."""
    levels, layers = len(config["block_out_channels"]), int(config.get("layers_per_block", 1))
    blocks = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        blocks |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.mid.block_1": f"{half}.mid_block.resnets.0",
            f"{half}.mid.attn_1": f"{half}.mid_block.attentions.0",
            f"{half}.mid.block_2": f"{half}.mid_block.resnets.1",
            f"{half}.norm_out": f"{half}.conv_norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
        }
    for level in range(levels):
        theirs, ours = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        blocks |= {f"{theirs}.block.{layer}": f"{ours}.resnets.{layer}" for layer in range(layers)}
        blocks[f"{theirs}.downsample.conv"] = f"{ours}.downsamplers.0.conv"
        # The decoder's levels are numbered from the image up, diffusers' from the latents.
        theirs, ours = f"decoder.up.{levels - 1 - level}", f"decoder.up_blocks.{level}"
        blocks |= {f"{theirs}.block.{layer}": f"{ours}.resnets.{layer}" for layer in range(layers + 1)}
        blocks[f"{theirs}.upsample.conv"] = f"{ours}.upsamplers.0.conv"
    return blocks
