"""LoRA files against diffusers, which loads and fuses them with PEFT."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.exporter.graph_folders import GraphFolders
from latentrt.exporter.lora import LoraFile, with_loras
from latentrt.exporter.source import Source
from latentrt.exporter.tiny_vae import with_tiny_vae

RANK = 3
LAYERS = {
    "unet": ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj", "proj_in", "time_emb_proj", "conv1"),
    # diffusers recognises kohya's layout by the projection back, and drops the other projections without it.
    "text_encoder": ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"),
    "text_encoder_2": ("self_attn.v_proj", "self_attn.out_proj", "mlp.fc2"),
}


def factors(source: Source, part: str, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors for some layers of a part, by path."""
    generator, found = torch.Generator().manual_seed(1), {}
    for path, layer in source.load(part).named_modules():
        if not path.endswith(LAYERS[part]) or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        out, *rest = layer.weight.shape
        down = torch.randn(rank, *rest, generator=generator) * 0.3
        up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator) * 0.3
        found[path] = down, up
    assert len(found) > 2
    return found


def clip_path(path: str) -> str:
    """A text encoder's layer as files name it, whatever the installed transformers does."""
    return path if path.startswith("text_model.") or path == "text_projection" else f"text_model.{path}"


def peft(source: Source) -> dict[str, Tensor]:
    """What diffusers' training scripts write today."""
    tensors = {}
    for part in [name for name in LAYERS if name in source.configs]:
        for path, (down, up) in factors(source, part).items():
            layer = f"{part}.{path if part == 'unet' else clip_path(path)}"
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return tensors


def older(source: Source) -> dict[str, Tensor]:
    """What they wrote before."""
    tensors = {}
    for path, (down, up) in factors(source, "unet").items():
        tensors |= {f"unet.{path}.lora.down.weight": down, f"unet.{path}.lora.up.weight": up}
    for path, (down, up) in factors(source, "text_encoder").items():
        if "self_attn" in path:
            layer = f"text_encoder.{clip_path(path)}.lora_linear_layer"
            tensors |= {f"{layer}.down.weight": down, f"{layer}.up.weight": up}
    return tensors


def kohya(source: Source, names: Callable[[str], str] = lambda path: path) -> dict[str, Tensor]:
    """kohya's layout, with alphas and in half precision, as most LoRAs are."""
    tensors, second = {}, "text_encoder_2" in source.configs
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if second else "lora_te", "text_encoder_2": "lora_te2"}
    for part in [name for name in LAYERS if name in source.configs]:
        for number, (path, (down, up)) in enumerate(factors(source, part).items()):
            flat = (names(path) if part == "unet" else clip_path(path)).replace(".", "_")
            layer = f"{prefixes[part]}_{flat}"
            tensors |= {f"{layer}.lora_down.weight": down.half(), f"{layer}.lora_up.weight": up.half()}
            # Where alphas differ, diffusers takes the commonest for projections of attention; here each is its own.
            other = number % 2 and part == "unet" and ".to_" not in path
            tensors[f"{layer}.alpha"] = torch.tensor(1.5 if other else 2.0)
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


def fused_by_diffusers(path: Path, file: Path, scale: float) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    return pipe


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("sd1", peft),
        ("sd1", older),
        ("sd1", kohya),
        ("sd2", kohya),
        ("sdxl", peft),
        ("sdxl", kohya),
        ("sdxl", lambda source: kohya(source, original)),
    ],
    ids=["sd1-peft", "sd1-older", "sd1-kohya", "sd2-kohya", "sdxl-peft", "sdxl-kohya", "sdxl-original-blocks"],
)
def test_fused_weights_are_those_of_diffusers(
    tiny: Any, tmp_path: Path, kind: str, write: Callable[[Source], Mapping[str, Tensor]]
) -> None:
    """Every layout, for linear layers and convolutions of U-Net and text encoders, with and without alphas."""
    source, file = Source.open(tiny.source(kind)), tmp_path / "style.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in write(source).items()}, file)
    fused = with_loras(source, [LoraFile(file, 0.7)])
    pipe = fused_by_diffusers(tiny.source(kind), file, 0.7)
    for part in source.configs:
        if part == "vae":
            continue
        ours, before = fused.load(part).state_dict(), source.load(part).state_dict()
        expected = getattr(pipe, part).state_dict()
        assert ours.keys() == expected.keys()
        changed = [name for name in ours if not torch.equal(ours[name], before[name])]
        assert len(changed) >= 2
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)


def test_alphas_of_the_header_count(tiny: Any, tmp_path: Path) -> None:
    """diffusers writes PEFT's settings into the header: an alpha for all layers, and one for some."""
    source, file = Source.open(tiny.source("sd1")), tmp_path / "style.safetensors"
    tensors = {
        f"unet.{path}.lora_{name}.weight": t
        for path, pair in factors(source, "unet").items()
        for name, t in zip("AB", pair, strict=True)
    }
    layers = [name.removesuffix(".lora_A.weight").removeprefix("unet.") for name in tensors if "lora_A" in name]
    settings = {
        "unet.r": RANK,
        "unet.lora_alpha": 9,
        "unet.alpha_pattern": {layers[0]: 5},
        "unet.rank_pattern": {},
        "unet.target_modules": layers,
        "unet.use_rslora": True,
        "unet.use_dora": False,
    }
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        file,
        {"lora_adapter_metadata": json.dumps(settings), "format": "pt"},
    )
    ours = with_loras(source, [LoraFile(file)]).load("unet").state_dict()
    expected = fused_by_diffusers(tiny.source("sd1"), file, 1.0).unet.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)


def test_several_are_added_up_and_told(tiny: Any, tmp_path: Path) -> None:
    """Two at half strength are one at full; files and scales are in the fingerprint."""
    source, file = Source.open(tiny.source("sd1")), tmp_path / "style.safetensors"
    save_file(peft(source), file)
    one, two = (with_loras(source, files) for files in ([LoraFile(file)], [LoraFile(file, 0.5)] * 2))
    ours, expected = two.load("unet").state_dict(), one.load("unet").state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6)
    assert len({source.fingerprint, one.fingerprint, two.fingerprint}) == 3
    assert [(lora.adapter.name, lora.adapter.scale) for lora in two.loras] == [("style.safetensors", 0.5)] * 2
    assert with_loras(source, []) is source


KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(down: int = 32, up: int = 32, rank: int = 2, key: str = KEY) -> dict[str, Tensor]:
    return {f"{key}.lora_A.weight": torch.ones(rank, down), f"{key}.lora_B.weight": torch.ones(up, rank)}


KOHYA = "lora_" + KEY.replace(".", "_")
OTHERS = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lora_magnitude_vector": "DoRA",
    "lora_mid.weight": "LoRA with a third factor",
    "diff_b": "whole differences of weights",
}
TWICE = {f"{KOHYA}.lora_down.weight": torch.ones(2, 32), f"{KOHYA}.lora_up.weight": torch.ones(32, 2)}
WRONG: list[tuple[dict[str, Tensor], str | None]] = [
    (
        pair(768),
        r"factors of the shapes \[2, 768\] and \[32, 2\].*is \[32, 32\]; it was made for a model whose texts are 768 "
        "wide, as those of Stable Diffusion 1.x",
    ),
    (pair(key=KEY.replace("blocks.0", "blocks.7", 1)), "a layer that sd1 does not have; .* texts are 32 wide$"),
    (pair(key="text_encoder_2.encoder.layers.0.mlp.fc1"), "changes text_encoder_2, which sd1 does not have"),
    (pair(key="unet.conv_norm_out"), "changes unet.conv_norm_out, a layer that sd1 does not have"),
    (dict([*pair().items()][:1]), "has one of its two factors alone"),
    (pair() | {f"{KEY}.lora_B.weight": torch.full((32, 2), torch.nan)}, "holds NaN or infinity"),
    (pair() | {f"{KEY}.lora_B.weight": torch.full((32, 2), 3e38)}, None),
    (pair() | {f"{KEY}.lora_A.weight": torch.ones(2, 32, dtype=torch.int32)}, "or no floating-point numbers"),
    (pair() | {f"{KEY}.lora.down.weight": torch.ones(2, 32)}, "has two tensors 'down'"),
    (pair() | TWICE, "twice, under two names"),
    (pair() | {f"{KEY}.alpha": torch.ones(3)}, "has 3 numbers, expected one"),
    (pair() | {"unet.surprise": torch.ones(3)}, "is no LoRA that is known: 'unet.surprise' is none of its tensors"),
    (pair(rank=0), "has factors of the shapes"),
    ({}, "holds no tensors"),
    *(({f"{KEY}.{end}": torch.ones(2, 2)}, f"has {kind} .*only plain LoRA can be") for end, kind in OTHERS.items()),
]


@pytest.mark.parametrize(("tensors", "message"), WRONG)
def test_a_file_that_cannot_be_fused(
    tiny: Any, tmp_path: Path, tensors: dict[str, Tensor], message: str | None
) -> None:
    """One clear sentence says what is wrong with it, before anything is exported."""
    source, file = Source.open(tiny.source("sd1")), tmp_path / "style.safetensors"
    save_file(tensors, file)
    if message is None:  # fits, but leaves the range of numbers
        with pytest.raises(SourceError, match=r"with style.safetensors the weights of unet.down.* are not finite"):
            with_loras(source, [LoraFile(file, 100)]).load("unet")
        return
    with pytest.raises(SourceError, match=message) as caught:
        with_loras(source, [LoraFile(file)])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tiny: Any, tmp_path: Path) -> None:
    """Missing, pickled, truncated, lying about its header, with settings that are none."""
    source = Source.open(tiny.source("sd1"))
    huge, cut, dora = (tmp_path / f"{name}.safetensors" for name in ("huge", "cut", "dora"))
    (tmp_path / "old.pt").write_bytes(b"pickle")
    huge.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    save_file(pair(), cut)
    cut.write_bytes(cut.read_bytes()[:-8])
    save_file(pair(), dora, {"lora_adapter_metadata": '{"unet.use_dora": true}'})
    for name, message in {
        "none.safetensors": "does not exist",
        "old.pt": "does not end with .safetensors; other files of weights can run code",
        "huge.safetensors": "its header claims 1,099,511,627,776 bytes",
        "cut.safetensors": "is damaged",
        "dora.safetensors": "has DoRA",
    }.items():
        with pytest.raises(SourceError, match=message):
            with_loras(source, [LoraFile(tmp_path / name)])


def test_graphs_of_others_have_no_weights_to_fuse_into(tiny: Any, tmp_path: Path) -> None:
    """A source that is run as it is takes neither a LoRA nor a tiny decoder."""
    graphs = dataclasses.replace(Source.open(tiny.source("sd1")), weights=object.__new__(GraphFolders))
    with pytest.raises(InvalidRequestError, match="sd1 holds graphs that are run as they are; a LoRA is fused"):
        with_loras(graphs, [LoraFile(tmp_path / "style.safetensors")])
    with pytest.raises(InvalidRequestError, match="sd1 holds graphs that are run as they are; a tiny VAE goes"):
        with_tiny_vae(graphs, tmp_path)


def test_a_file_with_its_scale() -> None:
    """A number behind the last colon is the scale; any other colon is the file's own."""
    assert LoraFile.parse("a.safetensors") == LoraFile(Path("a.safetensors"), 1.0)
    assert LoraFile.parse("a:b.safetensors:-0.5") == LoraFile(Path("a:b.safetensors"), -0.5)
    assert LoraFile.parse("C:style") == LoraFile(Path("C:style"), 1.0)
    for text in ("a:0", "a:nan", "a:inf", "a:101"):
        with pytest.raises(InvalidRequestError, match="the scale of a is"):
            LoraFile.parse(text)
