"""LoRA files with random factors, in the layouts that there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 3
LAYERS = {
    "unet": ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj", "proj_in", "time_emb_proj", "conv1"),
    # diffusers recognises kohya's layout by the projection back, and drops the other projections without it.
    "text_encoder": ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"),
    "text_encoder_2": ("self_attn.v_proj", "self_attn.out_proj", "mlp.fc2"),
    "transformer": (
        *("attn.to_q", "attn.to_out.0", "attn2.to_v", "attn.add_k_proj", "attn.to_add_out", "net.0.proj", "proj_mlp"),
        *("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "x_embedder", "context_embedder"),
        *(
            "timestep_embedder.linear_1",
            "text_embedder.linear_2",
            "guidance_embedder.linear_1",
            "proj_out",
            "pos_embed.proj",
        ),
    ),
}
DENOISERS = ("unet", "transformer")
FLUX = {
    "double_blocks_0_img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "double_blocks_0_txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "double_blocks_0_img_attn_proj": ("attn.to_out.0",),
    "double_blocks_0_txt_mlp_0": ("ff_context.net.0.proj",),
    "double_blocks_0_img_mlp_2": ("ff.net.2",),
    "double_blocks_0_txt_mod_lin": ("norm1_context.linear",),
    "single_blocks_0_linear2": ("proj_out",),
    "single_blocks_0_modulation_lin": ("norm.linear",),
}
"""Layers of FLUX's original transformer, those that diffusers converts at any size, and what they are in its blocks."""


def factors(source: Any, part: str, rank: int = RANK, seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors for some layers of a part, by path."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for path, layer in source.load(part).named_modules():
        if not path.endswith(LAYERS[part]) or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        out, *rest = layer.weight.shape
        down = torch.randn(rank, *rest, generator=generator) * 0.3
        up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator) * 0.3
        found[path] = down, up
    assert len(found) > 2
    return found


def parts(source: Any) -> list[str]:
    """Parts that get factors: T5, for which diffusers takes none, is not among them."""
    return [part for part in LAYERS if part in source.configs and "d_kv" not in source.configs[part]]


def clip_path(path: str) -> str:
    """A text encoder's layer as files name it, whatever the installed transformers does."""
    return path if path.startswith("text_model.") or path == "text_projection" else f"text_model.{path}"


def peft(source: Any, seed: int = 1) -> dict[str, Tensor]:
    """What diffusers' training scripts write today."""
    tensors = {}
    for part in parts(source):
        for path, (down, up) in factors(source, part, seed=seed).items():
            layer = f"{part}.{path if part in DENOISERS else clip_path(path)}"
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return tensors


def older(source: Any, seed: int = 1) -> dict[str, Tensor]:
    """What they wrote before."""
    tensors = {}
    for path, (down, up) in factors(source, "unet", seed=seed).items():
        tensors |= {f"unet.{path}.lora.down.weight": down, f"unet.{path}.lora.up.weight": up}
    for path, (down, up) in factors(source, "text_encoder", seed=seed).items():
        if "self_attn" in path:
            layer = f"text_encoder.{clip_path(path)}.lora_linear_layer"
            tensors |= {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
    return tensors


def kohya(source: Any, seed: int = 1, names: Callable[[str], str] = lambda path: path) -> dict[str, Tensor]:
    """kohya's layout, with alphas and in half precision, as most LoRAs are."""
    tensors, second = {}, "text_encoder_2" in source.configs
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if second else "lora_te", "text_encoder_2": "lora_te2"}
    for part in parts(source):
        for number, (path, (down, up)) in enumerate(factors(source, part, seed=seed).items()):
            flat = (names(path) if part == "unet" else clip_path(path)).replace(".", "_")
            layer = f"{prefixes[part]}_{flat}"
            tensors |= {f"{layer}.lora_down.weight": down.half(), f"{layer}.lora_up.weight": up.half()}
            # Where alphas differ, diffusers takes the commonest for projections of attention; here each is its own.
            other = number % 2 and part == "unet" and ".to_" not in path
            tensors[f"{layer}.alpha"] = torch.tensor(1.5 if other else 2.0)
    return tensors


def kohya_original(source: Any, seed: int = 1) -> dict[str, Tensor]:
    """The same with the names of the original denoiser's blocks, for the tiny SDXL, and for the tiny FLUX."""
    return kohya_flux(source, seed) if "transformer" in source.configs else kohya(source, seed, original)


def kohya_flux(source: Any, seed: int = 1) -> dict[str, Tensor]:
    """kohya's layout for the tiny FLUX, where one layer of the file may be several of the model's."""
    generator, transformer, tensors = torch.Generator().manual_seed(seed), source.load("transformer"), {}
    for number, (name, paths) in enumerate(FLUX.items()):
        block = transformer.transformer_blocks if name.startswith("double") else transformer.single_transformer_blocks
        weights = [block[0].get_submodule(path).weight for path in paths]
        rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": torch.randn(RANK, columns, generator=generator).half() * 0.3,
            f"lora_unet_{name}.lora_up.weight": torch.randn(rows, RANK, generator=generator).half() * 0.3,
            f"lora_unet_{name}.alpha": torch.tensor(RANK / (1 + number % 2)),
        }
    for path, (down, up) in factors(source, "text_encoder", seed=seed).items():
        layer = f"lora_te1_{clip_path(path).replace('.', '_')}"
        tensors |= {f"{layer}.lora_down.weight": down.half(), f"{layer}.lora_up.weight": up.half()}
        tensors[f"{layer}.alpha"] = torch.tensor(RANK / 2)  # diffusers scales in half precision: here that is exact
    return tensors


def original(path: str) -> str:
    """A layer of the tiny SDXL U-Net as the original code calls it."""
    blocks = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        **{f"up_blocks.{level}.resnets.{i}": f"output_blocks.{2 * level + i}.0" for level in (0, 1) for i in (0, 1)},
        **{f"up_blocks.0.attentions.{i}": f"output_blocks.{i}.1" for i in (0, 1)},
    }
    block = next(name for name in blocks if path.startswith(f"{name}."))
    layer = path.removeprefix(f"{block}.")
    return f"{blocks[block]}.{ {'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1'}.get(layer, layer) }"


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A file of them."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
