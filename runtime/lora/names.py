"""Names of tensors in LoRA files: the layouts of PEFT, of diffusers before it, and of kohya's scripts.

A file names layers of a model. kohya's layout writes underscores for dots, so layers are looked up by their paths with
underscores alone. Files for SDXL often have the names of the original U-Net's blocks, and those for SD3 and FLUX the
names of the original transformers' layers.
"""

from __future__ import annotations

from collections.abc import Iterable

from .transformers import Place, original_place

DOWN, UP, ALPHA = "down", "up", "alpha"
"""Roles of a tensor: the first factor, the second, and alpha, which scales their product as alpha over rank."""

_ENDINGS = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_A.default.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora_down.weight": DOWN,
    ".lora_up.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    "_lora.down.weight": DOWN,
    "_lora.up.weight": UP,
    ".down.weight": DOWN,
    ".up.weight": UP,
    ".alpha": ALPHA,
}

_OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "vera_": "VeRA",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoRA with a third factor",
    "lora_embedding_": "LoRA of an embedding",
    "lora_A.bias": "LoRA with biases",
    "lora_B.bias": "LoRA with biases",
    "on_input": "IA3",
    ".diff": "whole differences of weights",
    "string_to_param": "textual inversion",
}

_ORIGINAL_LAYERS = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def other_kind(name: str) -> str | None:
    """The kind of adapter, other than plain LoRA, that a tensor belongs to; ``None`` if its name tells of none."""
    return next((kind for mark, kind in _OTHERS.items() if mark in name), None)


def split_name(name: str) -> tuple[str, str] | None:
    """A tensor's layer, by its name in the file, and the tensor's role; ``None`` if it is no tensor of a LoRA."""
    for ending, role in _ENDINGS.items():
        if name.endswith(ending) and len(name) > len(ending):
            return name.removesuffix(ending).removesuffix(".lora"), role
    return None


def split_part(layer: str, parts: Iterable[str], denoiser: str) -> tuple[str, str]:
    """The part of the model that a layer belongs to, and the rest of its name, flat.

    Args:
        layer: The layer's name in the file.
        parts: Names of the model's parts, such as ``text_encoder`` and ``unet``.
        denoiser: The part that a name without a part's belongs to.

    Returns:
        The part's name, and the layer's flat name within it.
    """
    layer, parts = layer.removeprefix("base_model.model."), set(parts)
    prefixes = dict.fromkeys(("lora_unet_", "lora_transformer_", "diffusion_model."), denoiser)
    prefixes |= dict.fromkeys(("lora_te_", "lora_te1_", "text_encoders.clip_l.transformer."), "text_encoder")
    # T5, which is FLUX's second text encoder, is the third in kohya's layout for any model.
    t5 = "text_encoder_2" if denoiser == "transformer" and "text_encoder_3" not in parts else "text_encoder_3"
    prefixes |= {"lora_te2_": "text_encoder_2", "lora_te3_": t5}
    prefixes |= {f"{part}.": part for part in {*parts, "unet", "transformer", "text_encoder", "text_encoder_2"}}
    for prefix, part in prefixes.items():
        if layer.startswith(prefix):
            return part, flat(layer.removeprefix(prefix))
    return denoiser, flat(layer)


def flat(path: str) -> str:
    """A layer's path in kohya's layout: underscores for dots."""
    return path.replace(".processor.", ".").removesuffix(".processor").replace(".", "_")


class Layers:
    """The layers of a part that a file may name.

    Args:
        paths: Paths of the layers with a matrix or a convolution, within the part.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = {flat(path).removeprefix("text_model_"): path for path in paths}
        self._known = frozenset(self._paths.values())
        self._blocks = _original_blocks(self._known)

    def find(self, name: str) -> Place | None:
        """The layer of a flat name, or the layers that it is divided into here; ``None`` if there is none."""
        for each in (name, *self._original(name)):
            bare = each.removeprefix("text_model_")
            candidates = [bare, f"{bare}_0"]  # a projection back was a layer, and is now the first of two
            candidates += [bare.removesuffix(old) + new for old, new in _OLD_ATTENTION.items() if bare.endswith(old)]
            for candidate in candidates:
                if candidate in self._paths:
                    return Place((self._paths[candidate],))
        return original_place(name, self._known)

    def _original(self, name: str) -> list[str]:
        """Names in diffusers of a layer of the original U-Net."""
        for block, own in self._blocks.items():
            if name == block:
                return [own]
            if name.startswith(f"{block}_"):
                rest = name.removeprefix(f"{block}_")
                return [f"{own}_{_ORIGINAL_LAYERS.get(rest, rest)}"]
        return []


def _original_blocks(paths: Iterable[str]) -> dict[str, str]:
    """Flat names of blocks in diffusers, by their names in the original U-Net (CompVis and Stability AI)."""
    down, up = _levels(paths := list(paths), "down_blocks"), _levels(paths, "up_blocks")
    if not down:
        return {}
    blocks = {
        "time_embed_0": "time_embedding_linear_1",
        "time_embed_2": "time_embedding_linear_2",
        "label_emb_0_0": "add_embedding_linear_1",
        "label_emb_0_2": "add_embedding_linear_2",
        "input_blocks_0_0": "conv_in",
        "middle_block_0": "mid_block_resnets_0",
        "middle_block_1": "mid_block_attentions_0",
        "middle_block_2": "mid_block_resnets_1",
        "out_2": "conv_out",
    }
    number = 1
    for level, (count, attends) in enumerate(down):
        for layer in range(count):
            blocks[f"input_blocks_{number}_0"] = f"down_blocks_{level}_resnets_{layer}"
            if attends:
                blocks[f"input_blocks_{number}_1"] = f"down_blocks_{level}_attentions_{layer}"
            number += 1
        blocks[f"input_blocks_{number}_0_op"] = f"down_blocks_{level}_downsamplers_0_conv"
        number += 1
    number = 0
    for level, (count, attends) in enumerate(up):
        for layer in range(count):
            blocks[f"output_blocks_{number}_0"] = f"up_blocks_{level}_resnets_{layer}"
            if attends:
                blocks[f"output_blocks_{number}_1"] = f"up_blocks_{level}_attentions_{layer}"
            if layer == count - 1:
                last = 2 if attends else 1
                blocks[f"output_blocks_{number}_{last}_conv"] = f"up_blocks_{level}_upsamplers_0_conv"
            number += 1
    # Longer names first: "input_blocks_3_0_op" is no layer of a block "input_blocks_3_0".
    return dict(sorted(blocks.items(), key=lambda item: -len(item[0])))


def _levels(paths: Iterable[str], blocks: str) -> list[tuple[int, bool]]:
    """For each level of a U-Net's blocks the number of its residual blocks, and whether they have attention."""
    found: dict[int, tuple[set[str], bool]] = {}
    for path in paths:
        first, level, kind, number, *_ = [*path.split("."), "", "", ""]
        if first == blocks and level.isdecimal():
            resnets, attends = found.setdefault(int(level), (set(), False))
            if kind == "resnets":
                resnets.add(number)
            found[int(level)] = resnets, attends or kind == "attentions"
    return [(len(resnets), attends) for _, (resnets, attends) in sorted(found.items())]
