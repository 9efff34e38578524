"""Original ``names`` of SD3's and FLUX's layers in LoRA files, against diffusers' conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor, nn

from latentrt.engines.errors import SourceError
from latentrt.runtime.lora.reading import Lora, LoraFile, Target, read_lora

RANK, ALPHA = 2, 1.5
OUTSIDE = {
    "img_in": (3072, 64),
    "txt_in": (3072, 4096),
    "time_in_in_layer": (3072, 256),
    "time_in_out_layer": (3072, 3072),
    "vector_in_in_layer": (3072, 768),
    "vector_in_out_layer": (3072, 3072),
    "guidance_in_in_layer": (3072, 256),
    "guidance_in_out_layer": (3072, 3072),
}
FINAL = {"final_layer_linear": (64, 3072), "final_layer_adaLN_modulation_1": (6144, 3072)}
DOUBLE = {
    f"double_blocks_0_{stream}_{layer}": shape
    for stream in ("img", "txt")
    for layer, shape in {
        "attn_qkv": (9216, 3072),
        "attn_proj": (3072, 3072),
        "mlp_0": (12288, 3072),
        "mlp_2": (3072, 12288),
        "mod_lin": (18432, 3072),
    }.items()
}
SINGLE = {
    "single_blocks_0_linear1": (21504, 3072),
    "single_blocks_0_linear2": (3072, 15360),
    "single_blocks_0_modulation_lin": (9216, 3072),
}
XLABS = {f"double_blocks.0.processor.{kind}_lora{i}": n for i in (1, 2) for kind, n in (("qkv", 9216), ("proj", 3072))}


def factors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, *[1] * (len(shape) - 2))


def kohya(shapes: dict[str, tuple[int, ...]], alpha: bool = True) -> dict[str, Tensor]:
    tensors = {}
    for name, shape in shapes.items():
        down, up = factors(shape)
        tensors |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
        if alpha:
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def target(model: nn.Module, name: str, *others: str) -> Target:
    shapes = {
        path: tuple(layer.weight.shape)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    return Target(name, "transformer", ("transformer", *others), lambda part: shapes if part == "transformer" else {})


@pytest.fixture(scope="module")
def flux() -> Target:
    """FLUX.1 dev, of full width, with one block of each kind and without memory."""
    with init_empty_weights():
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    return target(model, "flux")


def changes(lora: Lora) -> dict[str, tuple[Tensor, Tensor]]:
    """Both factors of each layer, the first with the scale."""
    found = lora.factors["transformer"]
    return {path: (torch.tensor(each.down * each.scale), torch.tensor(each.up)) for path, each in found.items()}


@pytest.mark.parametrize("layout", ["kohya", "final layer", "comfyui", "xlabs"])
def test_factors_of_flux_are_those_of_diffusers(flux: Target, lora_files: Any, tmp_path: Path, layout: str) -> None:
    """Fused layers are divided, and what has another order of rows is put in order."""
    torch.manual_seed(1)
    if layout == "xlabs":
        shapes = XLABS | {"single_blocks.0.processor.qkv_lora": 9216, "single_blocks.0.processor.proj_lora": 3072}
        tensors = {}
        for name, rows in shapes.items():
            down, up = factors((rows, 15360 if "single_blocks.0.processor.proj" in name else 3072))
            tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    elif layout == "final layer":  # whose alphas diffusers leaves out
        tensors = kohya(FINAL, alpha=False)
    else:
        tensors = kohya(DOUBLE | SINGLE | OUTSIDE)
    if layout == "comfyui":
        tensors = {name.replace("lora_unet_", "diffusion_model."): tensor for name, tensor in tensors.items()}
    file = lora_files.write(tensors, tmp_path / "style.safetensors")
    ours = changes(read_lora(flux, LoraFile(file)))
    converted = diffusers.FluxPipeline.lora_state_dict(dict(tensors))
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}
    assert {f"{path}.lora_{factor}.weight" for path in ours for factor in "AB"} == theirs.keys()
    for path, pair in ours.items():
        for factor, tensor in zip("AB", pair, strict=True):
            torch.testing.assert_close(tensor, theirs[f"{path}.lora_{factor}.weight"])


def sd3_shapes(width: int = 32, texts: int = 96, channels: int = 8) -> dict[str, tuple[int, ...]]:
    """Weights of Stability AI's transformer with two blocks, the first with two attentions, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, channels, 2, 2),
        "context_embedder": (width, texts),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, 40),
        "y_embedder.mlp.2": (width, width),
        "final_layer.linear": (4 * channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for block, number, last in ((f"joint_blocks.{i}", i, i == 1) for i in (0, 1)):
        for stream in ("x_block", "context_block"):
            ends = last and stream == "context_block"  # it has neither a projection nor a feed-forward layer
            twice = stream == "x_block" and number == 0
            shapes[f"{block}.{stream}.adaLN_modulation.1"] = ((2 if ends else 9 if twice else 6) * width, width)
            for attention in ("attn", "attn2") if twice else ("attn",):
                shapes[f"{block}.{stream}.{attention}.qkv"] = (3 * width, width)
                if not ends:
                    shapes[f"{block}.{stream}.{attention}.proj"] = (width, width)
            if not ends:
                shapes[f"{block}.{stream}.mlp.fc1"] = (4 * width, width)
                shapes[f"{block}.{stream}.mlp.fc2"] = (width, 4 * width)
    return shapes


def test_weights_of_sd3_are_those_of_diffusers(tmp_path: Path, lora_files: Any) -> None:
    """Every original layer gets what it gets if a checkpoint is converted that has the LoRA in it."""
    torch.manual_seed(1)
    with init_empty_weights():
        model = diffusers.SD3Transformer2DModel(
            sample_size=16,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=96,
            caption_projection_dim=32,
            pooled_projection_dim=40,
            dual_attention_layers=(0,),
        )
    shapes = sd3_shapes()
    tensors = kohya({name.replace(".", "_"): shape for name, shape in shapes.items()})
    ours = changes(read_lora(target(model, "sd3"), LoraFile(lora_files.write(tensors, tmp_path / "a.safetensors"))))
    checkpoint = {"pos_embed": torch.zeros(1)}
    for name, shape in shapes.items():
        layer = f"lora_unet_{name.replace('.', '_')}"
        up, down = (tensors[f"{layer}.lora_{way}.weight"].flatten(1) for way in ("up", "down"))
        checkpoint |= {
            f"{name}.weight": (up @ down * (ALPHA / RANK)).reshape(shape),
            f"{name}.bias": torch.zeros(shape[0]),
        }
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    theirs = {name: tensor for name, tensor in converted.items() if name.endswith(".weight")}
    assert theirs.keys() == {f"{path}.weight" for path in ours}
    for path, (down, up) in ours.items():
        expected = theirs[f"{path}.weight"]
        torch.testing.assert_close((up.flatten(1) @ down.flatten(1)).reshape(expected.shape), expected)


def test_t5_is_where_the_model_has_it(lora_files: Any, tmp_path: Path) -> None:
    """In kohya's layout it is the third text encoder, also of FLUX, where it is the second."""
    path = "encoder.block.0.layer.0.SelfAttention.q"
    tensors = {f"lora_te3_{path.replace('.', '_')}.lora_{way}.weight": torch.ones(2, 2) for way in ("down", "up")}
    file = LoraFile(lora_files.write(tensors, tmp_path / "a.safetensors"))
    for part, parts in {
        "text_encoder_2": ("transformer", "text_encoder", "text_encoder_2"),
        "text_encoder_3": ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
    }.items():
        shapes: Any = {part: {path: (2, 2)}}
        model = Target("model", "transformer", parts, lambda part, shapes=shapes: shapes.get(part, {}))
        assert {part: [path]} == {each: [*layers] for each, layers in read_lora(model, file).factors.items()}


def test_files_for_another_transformer(flux: Target, lora_files: Any, tmp_path: Path) -> None:
    """The message tells whose names a file has; a layer that was divided must fit as a whole."""
    qkv = "double_blocks_0_img_attn_qkv"
    for tensors, message in (
        (kohya({"joint_blocks_0_x_block_attn_qkv": (96, 32)}), "names of Stable Diffusion 3's$"),
        (kohya({"double_blocks_7_img_attn_qkv": (9216, 3072)}), "a layer that flux does not have; .* of FLUX's$"),
        (kohya({qkv: (9215, 3072)}), r"to_q and .*to_v, whose weight in flux is \[9216, 3072\]"),
        (
            kohya({qkv: (9216, 3072)}) | kohya({"transformer_blocks_0_attn_to_k": (3072, 3072)}),
            r"changes transformer.transformer_blocks.0.attn.to_k twice",
        ),
    ):
        with pytest.raises(SourceError, match=message):
            read_lora(flux, LoraFile(lora_files.write(tensors, tmp_path / "a.safetensors")))
