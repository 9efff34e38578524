"""Names of tensors in LoRA files: every layout leads to the same layer and role, and other adapters are recognised."""

from __future__ import annotations

import pytest

from latentrt.runtime.lora.names import ALPHA, DOWN, UP, Layers, flat, other_kind, split_name, split_part

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PARTS = ("text_encoder", "unet")


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        (f"unet.{PATH}.lora_A.weight", f"unet.{PATH}", DOWN),
        (f"unet.{PATH}.lora_B.default.weight", f"unet.{PATH}", UP),
        (f"unet.{PATH}.lora.down.weight", f"unet.{PATH}", DOWN),
        (f"unet.{PATH}.lora_linear_layer.up.weight", f"unet.{PATH}", UP),
        ("lora_unet_a_b.lora_up.weight", "lora_unet_a_b", UP),
        ("lora_unet_a_b.alpha", "lora_unet_a_b", ALPHA),
        ("unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q", DOWN),
    ],
)
def test_a_name_is_a_layer_and_a_role(name: str, layer: str, role: str) -> None:
    """Endings of PEFT, of older diffusers and of kohya's scripts are told apart."""
    assert split_name(name) == (layer, role)


@pytest.mark.parametrize("name", ["unet.a.weight", "unet.a.bias", ".alpha", ""])
def test_other_tensors_are_no_part_of_a_lora(name: str) -> None:
    """A weight of the model itself, and a role without a layer, have no role here."""
    assert split_name(name) is None


@pytest.mark.parametrize(
    ("layer", "part", "rest"),
    [
        (f"unet.{PATH}", "unet", flat(PATH)),
        (f"base_model.model.unet.{PATH}", "unet", flat(PATH)),
        (f"lora_unet_{flat(PATH)}", "unet", flat(PATH)),
        (f"diffusion_model.{PATH}", "unet", flat(PATH)),
        (PATH, "unet", flat(PATH)),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder", "text_model_encoder_layers_0_mlp_fc1"),
        ("lora_te1_a", "text_encoder", "a"),
        ("lora_te2_a", "text_encoder_2", "a"),
        ("text_encoder.text_model.a.b", "text_encoder", "text_model_a_b"),
    ],
)
def test_a_layer_belongs_to_a_part(layer: str, part: str, rest: str) -> None:
    """Prefixes of all layouts name the part; without one it is the denoiser's."""
    assert split_part(layer, PARTS, "unet") == (part, rest)


def test_t5_is_the_second_or_the_third_encoder() -> None:
    """It is FLUX's second, and the third of a model that has three."""
    assert split_part("lora_te3_a", ("transformer", "text_encoder", "text_encoder_2"), "transformer")[0] == (
        "text_encoder_2"
    )
    assert split_part("lora_te3_a", ("transformer", "text_encoder_3"), "transformer")[0] == "text_encoder_3"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.hada_w1_a", "LoHa"),
        ("a.lokr_w1", "LoKr"),
        ("a.dora_scale", "DoRA"),
        ("a.on_input", "IA3"),
        ("a.lora_mid.weight", "LoRA with a third factor"),
        ("a.lora_A.weight", None),
    ],
)
def test_other_kinds_of_adapters_are_named(name: str, kind: str | None) -> None:
    """A message can say what the file has in place of a LoRA."""
    assert other_kind(name) == kind


def unet() -> Layers:
    """Layers of a U-Net of two levels, of which the first has attention."""
    paths = [
        *("conv_in", "conv_out", "time_embedding.linear_1", "mid_block.resnets.0.conv1"),
        *("down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0.conv2", PATH),
        *("up_blocks.0.resnets.0.conv_shortcut", "up_blocks.0.upsamplers.0.conv", "up_blocks.1.resnets.0.conv1"),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ]
    return Layers(paths)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (flat(PATH), PATH),
        ("conv_in", "conv_in"),
        ("input_blocks_0_0", "conv_in"),
        ("out_2", "conv_out"),
        ("time_embed_0", "time_embedding.linear_1"),
        ("middle_block_0_in_layers_2", "mid_block.resnets.0.conv1"),
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_1_1_transformer_blocks_0_attn1_to_q", PATH),
        ("input_blocks_2_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_3_0_out_layers_3", "down_blocks.1.resnets.0.conv2"),
        ("output_blocks_0_0_skip_connection", "up_blocks.0.resnets.0.conv_shortcut"),
        ("output_blocks_0_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_1_0_in_layers_2", "up_blocks.1.resnets.0.conv1"),
        (
            "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
    ],
)
def test_layers_are_found_by_either_name(name: str, path: str) -> None:
    """diffusers' own names, and those of the original U-Net's blocks."""
    found = unet().find(name)
    assert found is not None
    assert found.paths == (path,)


def test_text_encoders_of_old_files() -> None:
    """Attention had other names, and the first word of a path may be missing."""
    layers = Layers(["text_model.encoder.layers.0.self_attn.q_proj"])
    for name in ("text_model_encoder_layers_0_self_attn_to_q", "encoder_layers_0_self_attn_q_proj"):
        found = layers.find(name)
        assert found is not None
        assert found.paths == ("text_model.encoder.layers.0.self_attn.q_proj",)


def test_an_unknown_layer_is_none() -> None:
    """Neither name leads anywhere."""
    assert unet().find("input_blocks_9_0_in_layers_2") is None
