"""Configurations are read without trust: unknown classes and absurd numbers end in one sentence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentrt.exporter.source.opening import open_source

EditJson = Callable[..., None]
Refusal = Callable[..., str]


@pytest.mark.parametrize("name", ["StableDiffusionUpscalePipeline", "os.system", "", None, [], {}, 7])
def test_unknown_pipeline(tiny_source: Path, edit_json: EditJson, name: Any, refusal: Refusal) -> None:
    """A pipeline class that is not in the table is refused, whatever JSON stands in its place."""
    edit_json(tiny_source / "model_index.json", _class_name=name)
    assert "supported pipelines: StableDiffusionPipeline" in refusal(tiny_source)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer"])
@pytest.mark.parametrize("entry", [["os", "system"], [None, None], "UNet2DConditionModel", [["a"], {}], ..., 1])
def test_unknown_component_class(
    tiny_source: Path, edit_json: EditJson, component: str, entry: Any, refusal: Refusal
) -> None:
    """A component of another class is refused by name."""
    edit_json(tiny_source / "model_index.json", **{component: entry})
    message = refusal(tiny_source)
    assert message.startswith(component)
    assert "expected" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_class_name": "EvilScheduler"}, "EvilScheduler"),
        ({"_class_name": ...}, "_class_name"),
        ({"beta_schedule": "exec"}, "beta_schedule"),
        ({"beta_start": "0.1"}, "beta_start"),
        ({"beta_start": math.nan}, ""),
        ({"beta_end": math.inf}, ""),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"prediction_type": "guess"}, "prediction_type"),
        ({"prediction_type": []}, "prediction_type"),
    ],
)
def test_scheduler(
    tiny_source: Path, edit_json: EditJson, changes: dict[str, Any], expected: str, refusal: Refusal
) -> None:
    """A scheduler that no sampler can follow is the source's fault, and is found before anything is exported."""
    edit_json(tiny_source / "scheduler" / "scheduler_config.json", **changes)
    message = refusal(tiny_source)
    assert message.startswith("scheduler/scheduler_config.json")
    assert expected in message


def test_unbounded_scheduler(tiny_source: Path, edit_json: EditJson) -> None:
    """diffusers' ``-Infinity`` for "no bound" is understood, and does not reach the bundle, which is proper JSON."""
    edit_json(
        tiny_source / "scheduler" / "scheduler_config.json",
        _class_name="DPMSolverMultistepScheduler",
        lambda_min_clipped=-math.inf,
    )
    assert "lambda_min_clipped" not in open_source(tiny_source).scheduler


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"block_out_channels": ...}),
        ("unet/config.json", {"block_out_channels": []}),
        ("unet/config.json", {"block_out_channels": "32"}),
        ("unet/config.json", {"block_out_channels": [32] * 60}),
        ("unet/config.json", {"block_out_channels": [32, 10**9]}),
        ("unet/config.json", {"block_out_channels": [32, 10**400]}),
        ("unet/config.json", {"layers_per_block": 10**5}),
        ("unet/config.json", {"transformer_layers_per_block": [200, 200]}),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 1000}),
        ("unet/config.json", {"cross_attention_dim": [32, 32]}),
        ("unet/config.json", {"cross_attention_dim": 64}),
        ("unet/config.json", {"in_channels": 7}),
        ("unet/config.json", {"in_channels": True}),
        ("unet/config.json", {"sample_size": "16"}),
        ("unet/config.json", {"sample_size": [16]}),
        ("unet/config.json", {"sample_size": 10**6}),
        ("unet/config.json", {"sample_size": 16.5}),
        ("unet/config.json", {"norm_eps": math.nan}),
        ("unet/config.json", {"norm_eps": -math.inf}),
        ("unet/config.json", {"extra": json.loads("[" * 40 + "]" * 40)}),
        ("vae/config.json", {"block_out_channels": None}),
        ("vae/config.json", {"latent_channels": "4"}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"scaling_factor": None}),
        ("vae/config.json", {"shift_factor": "0"}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**5}),
        ("text_encoder/config.json", {"num_hidden_layers": 0}),
        ("text_encoder/config.json", {"max_position_embeddings": -1}),
        ("text_encoder/config.json", {"vocab_size": 1.5}),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_absurd_numbers(
    tiny_source: Path, edit_json: EditJson, file: str, changes: dict[str, Any], refusal: Refusal
) -> None:
    """Numbers that no model has, or that contradict another component, are refused before anything is built."""
    edit_json(tiny_source / file, **changes)
    refusal(tiny_source)


def test_tokenizer_of_gigabytes(tiny_source: Path, refusal: Refusal) -> None:
    """A tokenizer's file that is far larger than any is not read."""
    os.truncate(tiny_source / "tokenizer" / "tokenizer.json", 2**31)
    assert "tokenizer/tokenizer.json has over 64 MiB" in refusal(tiny_source)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (b"---\nlicense: creativeml-openrail-m\n---\n", "creativeml-openrail-m"),
        (b"---\nlicense:\n---\n", "unknown"),
        (b"\xff\xfe\x00", "unknown"),
        (b"license: " + b"x" * 9999, "x" * 200),
    ],
)
def test_licence(tiny_source: Path, card: bytes, licence: str) -> None:
    """The licence is the model card's, of bounded length; a card that cannot be read says nothing."""
    (tiny_source / "README.md").write_bytes(card)
    assert open_source(tiny_source).licence == licence
