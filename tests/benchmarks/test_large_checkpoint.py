"""Checkpoints that are written tensor by tensor: what comes out is a source, and its parts are of the real sizes."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from latentrt.benchmarks.large_checkpoint import SIZES, main, write_checkpoint
from latentrt.exporter.source import Source

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "tokenizer"


def test_a_source_in_shards(tmp_path: Path) -> None:
    """Every part loads from its shards with finite weights, and a transformer's step stays in range."""
    counts = write_checkpoint(tmp_path / "source", "tiny", TOKENIZER, seed=1, shard_bytes=20_000)
    assert len(list((tmp_path / "source" / "transformer").glob("*.safetensors"))) > 2
    source = Source.open(tmp_path / "source")
    assert source.family.settings(source)["t5"] is False
    for part, count in counts.items():
        module = source.load(part)
        assert sum(tensor.numel() for tensor in module.state_dict().values()) == count
    model = source.load("transformer")
    with torch.no_grad():
        texts, pooled = torch.randn(1, 90, 96), torch.randn(1, 40)
        flow = model(torch.randn(1, 16, 8, 8), texts, pooled, torch.tensor([500.0]), return_dict=False)[0]
    assert 0.01 < float(flow.std()) < 100


def test_the_transformer_has_the_size_of_the_real_one() -> None:
    """Stable Diffusion 3.5 medium's transformer: the number of weights that its model card rounds to 2.5 billion."""
    config = {"pooled_projection_dim": 2048, "joint_attention_dim": 4096, **SIZES["sd35-medium"]["transformer"]}
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(**config)
    assert 2.2e9 < sum(parameter.numel() for parameter in model.parameters()) < 2.6e9
    assert model.inner_dim == 1536


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is left as it is, and so is one to be made where there is no tokenizer."""
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "new"), "--tokenizer", str(tmp_path / "none")])
    assert "name the directory of a CLIP tokenizer" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
