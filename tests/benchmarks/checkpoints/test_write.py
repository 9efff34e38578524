"""Checkpoints that ``stable_diffusion``, ``sdxl``, ``sd3``, ``parts`` and ``random_weights`` write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusionXLPipeline
from safetensors import safe_open

from latentrt.benchmarks.checkpoints import random_weights
from latentrt.benchmarks.checkpoints.sd3 import TRANSFORMER
from latentrt.benchmarks.checkpoints.write import main
from latentrt.exporter.source.opening import open_source

TOKENIZER = Path(__file__).resolve().parents[3] / "examples" / "emoji" / "tokenizer"


def test_sdxl_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is fp16, in shards where there are many; diffusers draws with it and the exporter takes it."""
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 200_000)
    options = ["--kind", "sdxl", "--size", "tiny", "--tokenizer", str(TOKENIZER)]
    assert main([str(tmp_path / "a"), *options]) == 0
    files = sorted((tmp_path / "a").rglob("*.safetensors"))
    assert len({file.parent for file in files}) == 4
    assert len(files) > 4, "something must be in shards"
    for file in files:
        with safe_open(file, "np") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {np.dtype("float16")}  # noqa: SIM118
    theirs = StableDiffusionXLPipeline.from_pretrained(tmp_path / "a", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    picture = theirs("a red apple", num_inference_steps=1, width=32, height=32, output_type="np").images
    assert np.isfinite(picture).all()
    source = open_source(tmp_path / "a")
    assert source.family.name == "stable-diffusion-xl"
    for part in source.configs:
        assert sum(weight.numel() for weight in source.load(part).parameters()) > 0


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    """The same seed gives the same bytes, another one others."""
    written = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--kind", "sdxl", "--size", "tiny", "--tokenizer", str(TOKENIZER), "--seed", seed]
        assert main([str(tmp_path / name), *options]) == 0
        written.append((tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_size_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sizes belong to the kinds."""
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a"), "--kind", "sdxl", "--size", "sd15", "--tokenizer", str(TOKENIZER)])
    assert "the size 'sd15' is unknown; sdxl has sdxl, tiny" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_sd3_without_t5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part loads from its shards, and what the transformer predicts is finite and not nothing."""
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 20_000)
    assert main([str(tmp_path / "a"), "--kind", "sd3", "--size", "tiny", "--tokenizer", str(TOKENIZER)]) == 0
    assert len(list((tmp_path / "a" / "transformer").glob("*.safetensors"))) > 2
    source = open_source(tmp_path / "a")
    assert (source.family.name, source.family.settings(source)["t5"]) == ("stable-diffusion-3", False)
    for part in source.configs:
        assert sum(weight.numel() for weight in source.load(part).parameters()) > 0
    texts, pooled = torch.randn(1, 90, 96), torch.randn(1, 40)
    with torch.no_grad():
        model = source.load("transformer")
        flow = model(torch.randn(1, 16, 8, 8), texts, pooled, torch.tensor([500.0]), return_dict=False)[0]
    assert 0.01 < float(flow.std()) < 100


def test_sd3_has_the_size_of_the_real_one() -> None:
    """Stable Diffusion 3.5 medium's transformer, which its model card rounds to 2.5 billion weights."""
    with torch.device("meta"):
        model = SD3Transformer2DModel(**TRANSFORMER["sd35-medium"])
    assert 2.2e9 < sum(parameter.numel() for parameter in model.parameters()) < 2.6e9


@pytest.mark.heavy
def test_a_checkpoint_of_random_weights(emoji_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a source that the exporter takes, the same for the same seed; a directory in use is left alone."""
    flags = ["--size", "tiny", "--tokenizer", str(emoji_source / "tokenizer")]
    fingerprints = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([str(tmp_path / name), *flags, "--seed", seed]) == 0
        fingerprints.append(open_source(tmp_path / name).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "a"), *flags])
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "d"), "--tokenizer", str(tmp_path / "nowhere")])
    assert "is not there; name the directory of a CLIP tokenizer" in capsys.readouterr().err
