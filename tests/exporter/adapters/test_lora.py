"""LoRA files against diffusers, which loads and fuses them with PEFT."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.exporter.adapters.lora import LoraFiles
from latentrt.exporter.adapters.registry import open_model
from latentrt.exporter.adapters.tiny_vae import TinyVaeFiles
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.source.optimum import GraphFolders
from latentrt.runtime.lora.reading import LoraFile


def fused_by_diffusers(path: Path, file: Path, scale: float) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(path)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(pipe._lora_loadable_modules, lora_scale=scale)  # of FLUX it leaves the text encoder out unless told
    pipe.unload_lora_weights()
    return pipe


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("sd1", "peft"),
        ("sd1", "older"),
        ("sd1", "kohya"),
        ("sd2", "kohya"),
        ("sdxl", "peft"),
        ("sdxl", "kohya"),
        ("sdxl", "kohya_original"),
        ("sd35", "peft"),
        ("flux-dev", "peft"),
        ("flux-dev", "kohya_original"),
    ],
)
def test_fused_weights_are_those_of_diffusers(
    tiny: Any, lora_files: Any, tmp_path: Path, kind: str, layout: str
) -> None:
    """Every layout, for linear layers and convolutions of denoiser and text encoders, with and without alphas."""
    source = open_source(tiny.source(kind))
    file = lora_files.write(getattr(lora_files, layout)(source), tmp_path / "style.safetensors")
    fused = open_model(source, [LoraFiles((LoraFile(file, 0.7),))])
    pipe = fused_by_diffusers(tiny.source(kind), file, 0.7)
    for part in lora_files.parts(source):
        ours, before = fused.load(part).state_dict(), source.load(part).state_dict()
        expected = getattr(pipe, part).state_dict()
        assert ours.keys() == expected.keys()
        changed = [name for name in ours if not torch.equal(ours[name], before[name])]
        assert len(changed) >= 2
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)


def test_alphas_of_the_header_count(tiny: Any, lora_files: Any, tmp_path: Path) -> None:
    """diffusers writes PEFT's settings into the header: an alpha for all layers, and one for some."""
    source, file = open_source(tiny.source("sd1")), tmp_path / "style.safetensors"
    tensors = {
        f"unet.{path}.lora_{name}.weight": t
        for path, pair in lora_files.factors(source, "unet").items()
        for name, t in zip("AB", pair, strict=True)
    }
    layers = [name.removesuffix(".lora_A.weight").removeprefix("unet.") for name in tensors if "lora_A" in name]
    settings = {
        "unet.r": lora_files.RANK,
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
    ours = open_model(source, [LoraFiles((LoraFile(file),))]).load("unet").state_dict()
    expected = fused_by_diffusers(tiny.source("sd1"), file, 1.0).unet.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)


def test_several_are_added_up_and_told(tiny: Any, lora_files: Any, tmp_path: Path) -> None:
    """Two at half strength are one at full; files and scales are in the fingerprint."""
    source, file = open_source(tiny.source("sd1")), tmp_path / "style.safetensors"
    lora_files.write(lora_files.peft(source), file)
    one, two = (open_model(source, [LoraFiles(files)]) for files in ((LoraFile(file),), (LoraFile(file, 0.5),) * 2))
    ours, expected = two.load("unet").state_dict(), one.load("unet").state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6)
    assert len({source.fingerprint, one.fingerprint, two.fingerprint}) == 3
    assert [(record.name, record.scale) for record in two.records] == [("style.safetensors", 0.5)] * 2
    assert open_model(source).fingerprint == source.fingerprint
    assert LoraFiles.parse({"lora": []}) is None


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
    source, file = open_source(tiny.source("sd1")), tmp_path / "style.safetensors"
    save_file(tensors, file)
    if message is None:  # fits, but leaves the range of numbers
        with pytest.raises(SourceError, match=r"with style.safetensors the weights of unet.down.* are not finite"):
            open_model(source, [LoraFiles((LoraFile(file, 100),))]).load("unet")
        return
    with pytest.raises(SourceError, match=message) as caught:
        open_model(source, [LoraFiles((LoraFile(file),))])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tiny: Any, tmp_path: Path) -> None:
    """Missing, pickled, truncated, lying about its header, with settings that are none."""
    source = open_source(tiny.source("sd1"))
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
            open_model(source, [LoraFiles((LoraFile(tmp_path / name),))])


def test_graphs_of_others_have_no_weights_to_fuse_into(tiny: Any, tmp_path: Path) -> None:
    """A source that is run as it is takes neither a LoRA nor a tiny decoder."""
    graphs = dataclasses.replace(open_source(tiny.source("sd1")), weights=object.__new__(GraphFolders))
    with pytest.raises(
        InvalidRequestError, match="sd1 holds graphs that are run as they are; a LoRA goes with weights"
    ):
        open_model(graphs, [LoraFiles((LoraFile(tmp_path / "style.safetensors"),))])
    with pytest.raises(InvalidRequestError, match="sd1 holds graphs that are run as they are; a tiny VAE goes"):
        open_model(graphs, [TinyVaeFiles(tmp_path)])


def test_a_file_with_its_scale() -> None:
    """A number behind the last colon is the scale; any other colon is the file's own."""
    assert LoraFile.parse("a.safetensors") == LoraFile(Path("a.safetensors"), 1.0)
    assert LoraFile.parse("a:b.safetensors:-0.5") == LoraFile(Path("a:b.safetensors"), -0.5)
    assert LoraFile.parse("C:style") == LoraFile(Path("C:style"), 1.0)
    for text in ("a:0", "a:nan", "a:inf", "a:101"):
        with pytest.raises(InvalidRequestError, match="the scale of a is"):
            LoraFile.parse(text)
