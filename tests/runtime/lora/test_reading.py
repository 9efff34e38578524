"""LoRA files that are put on a bundle: their weights beside those fused at build, and files that do not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentrt.engines.errors import BundleError, InvalidRequestError, SourceError
from latentrt.exporter.adapters.lora import LoraFiles
from latentrt.exporter.adapters.registry import open_model
from latentrt.exporter.source.opening import open_source
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.cli import main
from latentrt.runtime.components.lora_weights import LAYERS_FILE, changed_weights, target_of
from latentrt.runtime.families import family_of
from latentrt.runtime.images.png import read_parameters
from latentrt.runtime.lora.reading import LoraFile, read_lora

FORM = "opset20-fp32"
OPTIONS: dict[str, Any] = {"steps": 2, "seed": 3, "width": 32, "height": 24, "sampler": "euler"}


@pytest.fixture
def copied(sd1: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(sd1, tmp_path / "bundle"))


def draw(pipe: Pipeline, **options: Any) -> NDArray[np.uint8]:
    return pipe("a red apple", **{**OPTIONS, **options}).images


def test_weights_are_those_that_are_fused_at_build(tiny: Any, sd1: Path, lora_pair: tuple[Path, Path]) -> None:
    """To rounding, for linear layers, which a graph holds transposed, and convolutions; no other weight is changed."""
    opened = Bundle.open(sd1)
    loras = [LoraFile(lora_pair[0], 0.8), LoraFile(lora_pair[1], -0.5)]
    family = family_of(opened.manifest)
    graphs = {name: opened.graph(name, FORM) for name in ("text_encoder", "unet", "unet_prompt", "unet_step")}
    changed = changed_weights(opened, family, graphs, [read_lora(target_of(opened, family), each) for each in loras])
    fused = open_model(open_source(tiny.source("sd1")), [LoraFiles(tuple(loras))])
    before = open_source(tiny.source("sd1"))
    for part in ("text_encoder", "unet"):
        own, plain = fused.load(part).state_dict(), before.load(part).state_dict()
        expected = {name for name in own if not torch.equal(own[name], plain[name])}
        assert {name.removesuffix(".T").partition(".")[2] for name in changed[part]} == expected
        for name, values in changed[part].items():
            weight = own[name.removesuffix(".T").partition(".")[2]].numpy()
            np.testing.assert_allclose(values.T if name.endswith(".T") else values, weight, rtol=1e-5, atol=1e-6)
    stages = changed["unet_prompt"].keys() | changed["unet_step"].keys()
    assert stages | {n for n in changed["unet"] if "time_emb_proj" in n} == changed["unet"].keys()


KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(down: int = 32, **others: Any) -> dict[str, Any]:
    return {f"{KEY}.lora_A.weight": torch.ones(2, down), f"{KEY}.lora_B.weight": torch.ones(32, 2), **others}


def test_a_file_that_does_not_fit_changes_nothing(
    fresh: Pipeline, lora_pair: tuple[Path, Path], lora_files: Any, tmp_path: Path
) -> None:
    """Wrong shapes, NaN, other kinds, a truncated file, a huge header: one sentence, and the LoRAs stay as they are."""
    fresh.set_loras([lora_pair[0]])
    before = draw(fresh)
    huge, cut = tmp_path / "huge.safetensors", tmp_path / "cut.safetensors"
    huge.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    cut.write_bytes(lora_pair[0].read_bytes()[:-8])
    wrong = {
        "wide": (pair(768), r"\[2, 768\] and \[32, 2\] .* as those of Stable Diffusion 1.x"),
        "nan": (pair(**{f"{KEY}.alpha": torch.tensor(torch.nan)}), "holds NaN"),
        "loha": (pair(**{f"{KEY}.hada_w1_a": torch.ones(2, 2)}), "has LoHa"),
        "lokr": (pair(**{f"{KEY}.lokr_w1": torch.ones(2, 2)}), "has LoKr"),
        "dora": (pair(**{f"{KEY}.lora_magnitude_vector": torch.ones(2)}), "has DoRA"),
        "large": (pair(**{f"{KEY}.alpha": torch.tensor(3e38)}), "the weights of unet.down.* are not finite"),
    }
    cases = [
        (lora_files.write(tensors, tmp_path / f"{name}.safetensors"), text) for name, (tensors, text) in wrong.items()
    ]
    cases += [(huge, "its header claims"), (cut, "is damaged"), (tmp_path / "none.safetensors", "does not exist")]
    for path, message in cases:
        with pytest.raises(SourceError, match=message) as caught:
            fresh.set_loras([(path, 100)])
        assert "\n" not in str(caught.value)
    for loras, message in (
        ("a.safetensors", "loras is a str, expected a list"),
        ([3], "loras has 3, expected a file"),
        ([(lora_pair[0], "much")], "expected a file, or"),
        ([(lora_pair[0], float("nan"))], "the scale of a.safetensors is nan"),
        ([lora_pair[0]] * 101, "101 entries"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            fresh.set_loras(loras)  # type: ignore[arg-type]
    np.testing.assert_array_equal(draw(fresh), before)


def test_half_precision_of_the_brain_kind(fresh: Pipeline, tiny: Any, lora_files: Any, tmp_path: Path) -> None:
    """A file in bf16, which numpy does not have, counts with the numbers that torch reads."""
    rounded = {name: t.bfloat16() for name, t in lora_files.peft(open_source(tiny.source("sd1"))).items()}
    half = lora_files.write(rounded, tmp_path / "half.safetensors")
    full = lora_files.write({name: t.float() for name, t in rounded.items()}, tmp_path / "full.safetensors")
    np.testing.assert_array_equal(draw(fresh, loras=[half]), draw(fresh, loras=[full]))


def test_bundles_that_take_none(copied: Path, lora_pair: tuple[Path, Path]) -> None:
    """One without a list of layers, one whose list is damaged, quantised layers, and engines that a caller opened."""
    with Pipeline.load(copied, "onnxruntime") as pipe:
        other = Pipeline(pipe.bundle, pipe.engines)
        with pytest.raises(InvalidRequestError, match=r"load the bundle with Pipeline\.load"):
            other.set_loras([lora_pair[0]])
    bundle = Bundle.open(copied)
    family = family_of(bundle.manifest)
    lora = read_lora(target_of(bundle, family), LoraFile(lora_pair[0]))
    small = dataclasses.replace(bundle.graph("unet_prompt", FORM), precision="int8")
    with pytest.raises(SourceError, match=r"which is quantised in this bundle; take a higher precision"):
        changed_weights(bundle, family, {"unet_step": small}, [lora])
    path, manifest = copied / LAYERS_FILE, json.loads((copied / "bundle.json").read_text())
    for content in ("[]", "{", '{"unet": {"a": [0]}}', '{"unet": [1]}', '{"unet": {"a": ["b"]}}'):
        path.write_text(content)
        manifest["files"][LAYERS_FILE]["size"] = len(content)
        (copied / "bundle.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="is not a list of layers"):
            target_of(Bundle.open(copied), family)
    del manifest["files"][LAYERS_FILE]
    (copied / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(
        BundleError, match=r"does not say which layers it has, so no LoRA can be put on; build it again"
    ):
        Pipeline.load(copied, "onnxruntime", loras=[lora_pair[0]])


def test_layers_that_cannot_be_told_apart(copied: Path, lora_pair: tuple[Path, Path]) -> None:
    """Where weights of two layers are one constant of the graph, none is changed for one of them alone."""
    path = copied / LAYERS_FILE
    parts = json.loads(path.read_text())
    parts["unet"][KEY.removeprefix("unet.")] = None
    path.write_text(json.dumps(parts, separators=(",", ":")))
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["files"][LAYERS_FILE]["size"] = path.stat().st_size
    (copied / "bundle.json").write_text(json.dumps(manifest))
    bundle = Bundle.open(copied)
    with pytest.raises(SourceError, match=r"attn2.to_k, whose weights are equal to another layer's .* when the bundle"):
        read_lora(target_of(bundle, family_of(bundle.manifest)), LoraFile(lora_pair[0]))


def test_the_command_line_puts_them_on(
    fresh: Pipeline, lora_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--lora FILE:SCALE`` draws what the pipeline draws, and the picture and the report say with what."""
    shutil.copyfile(lora_pair[0], tmp_path / "style.safetensors")
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    loras = ["--lora", f"{tmp_path / 'style.safetensors'}:0.8", "--lora", str(lora_pair[1])]
    output = tmp_path / "o.png"
    asked = ["generate", str(fresh.bundle.path), "a red apple", f"--output={output}", "--engine=onnxruntime"]
    assert main([*asked, *options, *loras, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["request"]["loras"]
    assert [(Path(each["path"]).name, each["scale"]) for each in told] == [
        ("style.safetensors", 0.8),
        (lora_pair[1].name, 1),
    ]
    parameters = read_parameters(output)
    assert parameters is not None
    assert f"style.safetensors 0.8 {told[0]['sha256'][:12]}; b.safetensors 1 {told[1]['sha256'][:12]}" in parameters
    assert main([*asked, *options, "--lora", str(tmp_path / "none.safetensors")]) == 1
    assert "does not exist" in capsys.readouterr().err
