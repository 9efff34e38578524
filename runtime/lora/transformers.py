"""Layers of SD3's and FLUX's transformers under their original names, which LoRA files of other tools have.

The original code (Stability AI, Black Forest Labs) has one layer where diffusers has several, such as queries, keys and
values. These share the first factor of the one, and divide the rows of its second factor among themselves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Place:
    """The layers that the factors of a file's layer belong to.

    Attributes:
        paths: Layers of the model whose weights, one below the other, are the weight of the file's layer.
        swapped: Whether the two halves of the rows change places: the original has shift before scale, diffusers scale
            before shift.
    """

    paths: tuple[str, ...]
    swapped: bool = False

    def divide(self, up: NDArray[np.float32], rows: Sequence[int]) -> list[NDArray[np.float32]]:
        """Divide the second factor among the layers.

        Args:
            up: float32 ``[sum of rows, rank]``, or ``[sum of rows, rank, 1, 1]``.
            rows: Number of rows of each layer's weight.
        """
        return np.split(np.roll(up, len(up) // 2, axis=0) if self.swapped else up, np.cumsum(rows[:-1]))


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_BLOCKS = {
    "double_blocks": "transformer_blocks",
    "joint_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
}
_LAYERS = {
    "double_blocks": {
        "img_attn_qkv": _QKV,
        "img_attn_proj": ("attn.to_out.0",),
        "img_mlp_0": ("ff.net.0.proj",),
        "img_mlp_2": ("ff.net.2",),
        "img_mod_lin": ("norm1.linear",),
        "txt_attn_qkv": _ADDED_QKV,
        "txt_attn_proj": ("attn.to_add_out",),
        "txt_mlp_0": ("ff_context.net.0.proj",),
        "txt_mlp_2": ("ff_context.net.2",),
        "txt_mod_lin": ("norm1_context.linear",),
        # XLabs' names
        "qkv_lora1": _QKV,
        "proj_lora1": ("attn.to_out.0",),
        "qkv_lora2": _ADDED_QKV,
        "proj_lora2": ("attn.to_add_out",),
    },
    "single_blocks": {
        "linear1": (*_QKV, "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation_lin": ("norm.linear",),
        "qkv": _QKV,  # XLabs' names
        "proj": ("proj_out",),
    },
    "joint_blocks": {
        "x_block_attn_qkv": _QKV,
        "x_block_attn_proj": ("attn.to_out.0",),
        "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block_attn2_proj": ("attn2.to_out.0",),
        "x_block_mlp_fc1": ("ff.net.0.proj",),
        "x_block_mlp_fc2": ("ff.net.2",),
        "x_block_adaLN_modulation_1": ("norm1.linear",),
        "context_block_attn_qkv": _ADDED_QKV,
        "context_block_attn_proj": ("attn.to_add_out",),
        "context_block_mlp_fc1": ("ff_context.net.0.proj",),
        "context_block_mlp_fc2": ("ff_context.net.2",),
        "context_block_adaLN_modulation_1": ("norm1_context.linear",),
    },
}
_OUTSIDE = {
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
    # FLUX
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    # SD3
    "x_embedder_proj": "pos_embed.proj",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
}
_MODELS = {"joint_blocks": "Stable Diffusion 3", **dict.fromkeys(("double_blocks", "single_blocks"), "FLUX")}
_NAME = re.compile(r"(double_blocks|joint_blocks|single_blocks)_(\d+)_(.+)")


def original_place(name: str, paths: Collection[str]) -> Place | None:
    """The place in diffusers' transformer of a layer of the original code; ``None`` if there is no such layer.

    Args:
        name: The layer's name, with underscores for dots.
        paths: Paths of the model's layers.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        place = Place((_OUTSIDE.get(name, ""),), name == "final_layer_adaLN_modulation_1")
    else:
        kind, number, layer = found.groups()
        block = f"{_BLOCKS[kind]}.{number}"
        # SD3's last block does not use the text states behind attention, and modulates them as the last layer does.
        last = layer == "context_block_adaLN_modulation_1" and f"{block}.attn.to_add_out" not in paths
        place = Place(tuple(f"{block}.{each}" for each in _LAYERS[kind].get(layer, ("",))), last)
    return place if all(path in paths for path in place.paths) else None


def model_of(name: str) -> str | None:
    """The model whose transformer has a layer of this name, flat or not; ``None`` if the name does not tell."""
    if "single_transformer_blocks" in name:
        return "FLUX"
    return next((model for block, model in _MODELS.items() if block in name), None)
