"""Checkpoints in the original layout, written from diffusers directories, for tests.

An inverse of what diffusers reads: names are found by walking the blocks of the modules themselves, as the original
code numbers them, and not by the exporter's table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def _put(found: dict[str, Tensor], prefix: str, module: nn.Module) -> None:
    found |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _put_resnet(found: dict[str, Tensor], prefix: str, resnet: nn.Module) -> None:
    for ours, theirs in RESNET:
        if getattr(resnet, ours, None) is not None:
            _put(found, f"{prefix}.{theirs}", getattr(resnet, ours))


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    """``model.diffusion_model.*``."""
    found: dict[str, Tensor] = {}
    _put(found, "time_embed.0", unet.time_embedding.linear_1)
    _put(found, "time_embed.2", unet.time_embedding.linear_2)
    if getattr(unet, "add_embedding", None) is not None:
        _put(found, "label_emb.0.0", unet.add_embedding.linear_1)
        _put(found, "label_emb.0.2", unet.add_embedding.linear_2)
    _put(found, "input_blocks.0.0", unet.conv_in)
    number = 1
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            _put_resnet(found, f"input_blocks.{number}.0", resnet)
            if attention is not None:
                _put(found, f"input_blocks.{number}.1", attention)
            number += 1
        for sampler in block.downsamplers or ():
            _put(found, f"input_blocks.{number}.0.op", sampler.conv)
            number += 1
    _put_resnet(found, "middle_block.0", unet.mid_block.resnets[0])
    _put(found, "middle_block.1", unet.mid_block.attentions[0])
    _put_resnet(found, "middle_block.2", unet.mid_block.resnets[1])
    number = 0
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for place, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True), start=1):
            modules = (
                [resnet, attention, *(block.upsamplers or ())] if place == len(attentions) else [resnet, attention]
            )
            for index, module in enumerate(each for each in modules if each is not None):
                if module is resnet:
                    _put_resnet(found, f"output_blocks.{number}.{index}", module)
                else:
                    _put(found, f"output_blocks.{number}.{index}", module)
            number += 1
    _put(found, "out.0", unet.conv_norm_out)
    _put(found, "out.2", unet.conv_out)
    return {f"model.diffusion_model.{name}": tensor for name, tensor in found.items()}


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    """``first_stage_model.*``; attention is a 1x1 convolution there."""
    found: dict[str, Tensor] = {}
    _put(found, "quant_conv", vae.quant_conv)
    _put(found, "post_quant_conv", vae.post_quant_conv)
    sides = (("encoder", "down", "downsample"), ("decoder", "up", "upsample"))
    for (side, direction, sampling), half in zip(sides, (vae.encoder, vae.decoder), strict=True):
        _put(found, f"{side}.conv_in", half.conv_in)
        _put(found, f"{side}.norm_out", half.conv_norm_out)
        _put(found, f"{side}.conv_out", half.conv_out)
        blocks = half.down_blocks if side == "encoder" else reversed(half.up_blocks)
        for level, block in enumerate(blocks):
            for layer, resnet in enumerate(block.resnets):
                _put(found, f"{side}.{direction}.{level}.block.{layer}", resnet)
            for sampler in getattr(block, f"{sampling}rs") or ():
                _put(found, f"{side}.{direction}.{level}.{sampling}.conv", sampler.conv)
        for layer, resnet in enumerate(half.mid_block.resnets, start=1):
            _put(found, f"{side}.mid.block_{layer}", resnet)
        (attention,) = half.mid_block.attentions
        _put(found, f"{side}.mid.attn_1.norm", attention.group_norm)
        modules = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "proj_out": attention.to_out[0]}
        for name, module in modules.items():
            found[f"{side}.mid.attn_1.{name}.weight"] = module.weight.data[:, :, None, None]
            found[f"{side}.mid.attn_1.{name}.bias"] = module.bias.data
    return {
        f"first_stage_model.{name.replace('conv_shortcut', 'nin_shortcut')}": tensor for name, tensor in found.items()
    }


def clip_tensors(model: Any, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder, with the table of positions that checkpoints of its time have."""
    bare = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    found = {f"{prefix}text_model.{name}": tensor for name, tensor in bare.items()}
    positions = len(bare["embeddings.position_embedding.weight"])
    return {**found, f"{prefix}text_model.embeddings.position_ids": torch.arange(positions)[None]}


def openclip_tensors(model: Any, prefix: str, *, extra_layer: bool) -> dict[str, Tensor]:
    """The same in OpenCLIP's form, with the last layer again if SD 2.x's unused one is wanted."""
    text = getattr(model, "text_model", model)
    embeddings = text.embeddings
    found = {
        "positional_embedding": embeddings.position_embedding.weight.data,
        "token_embedding.weight": embeddings.token_embedding.weight.data,
        "logit_scale": torch.tensor(4.6),
    }
    _put(found, "ln_final", text.final_layer_norm)
    width = text.final_layer_norm.weight.shape[0]
    projected = getattr(model, "text_projection", None)
    found["text_projection"] = torch.eye(width) if projected is None else projected.weight.data.T
    layers = list(text.encoder.layers)
    for number, layer in enumerate([*layers, layers[-1]] if extra_layer else layers):
        place, attention = f"transformer.resblocks.{number}", layer.self_attn
        for kind in ("weight", "bias"):
            parts = [getattr(module, kind).data for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
            found[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
        _put(found, f"{place}.attn.out_proj", attention.out_proj)
        _put(found, f"{place}.ln_1", layer.layer_norm1)
        _put(found, f"{place}.ln_2", layer.layer_norm2)
        _put(found, f"{place}.mlp.c_fc", layer.mlp.fc1)
        _put(found, f"{place}.mlp.c_proj", layer.mlp.fc2)
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def tensors(kind: str, parts: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a checkpoint.

    Args:
        kind: ``sd1``, ``sd2``, ``sdxl`` or ``refiner``.
        parts: Modules by diffusers' names.
    """
    found = {**unet_tensors(parts["unet"]), **vae_tensors(parts["vae"])}
    if kind == "sd1":
        found |= clip_tensors(parts["text_encoder"], "cond_stage_model.transformer.")
    elif kind == "sd2":
        found |= openclip_tensors(parts["text_encoder"], "cond_stage_model.model.", extra_layer=True)
    elif kind == "sdxl":
        found |= clip_tensors(parts["text_encoder"], "conditioner.embedders.0.transformer.")
        found |= openclip_tensors(parts["text_encoder_2"], "conditioner.embedders.1.model.", extra_layer=False)
    else:
        found |= openclip_tensors(parts["text_encoder_2"], "conditioner.embedders.0.model.", extra_layer=False)
    return found


def load_parts(directory: Path) -> dict[str, Any]:
    """The modules of a diffusers directory, as the libraries load them."""
    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    there = {name: kind for name, kind in classes.items() if (directory / name).is_dir()}
    return {name: kind.from_pretrained(directory / name) for name, kind in there.items()}


def write(file: Path, directory: Path, kind: str) -> Path:
    """Write a checkpoint of a diffusers directory, with what training leaves in such files besides."""
    found = tensors(kind, load_parts(directory))
    found |= {"betas": torch.linspace(0.1, 0.2, 10), "model_ema.decay": torch.tensor(0.99)}
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, file)
    return file
