"""``latentrt build-engine --engine openvino``: what it compiles is in the bundle, and is what a pipeline opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.openvino import engine as openvino
from latentrt.engines.openvino import engine as ov
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import main

Captured = pytest.CaptureFixture[str]
PARTS = ["text_encoder", "unet_prompt", "unet_schedule", "unet_step", "vae_decoder"]


@pytest.fixture
def output(tiny_bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A bundle that was exported already."""
    return Path(shutil.copytree(tiny_bundles["sd1"], tmp_path / "bundle"))


def build(source: Path, output: Path, *options: str) -> int:
    return main(["build-engine", str(source), "--output", str(output), "--engine", "openvino", *options])


def opened(pipe: Pipeline) -> list[bool]:
    """Of each engine, whether its model came from the bundle."""
    return [engine.opened.reused for engine in pipe.engines.values()]  # type: ignore[attr-defined]


def test_a_pipeline_opens_what_was_compiled(
    tiny_sources: dict[str, Path], output: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part is there once, a second build finds it, and a pipeline compiles nothing and draws the same bits."""
    with Pipeline.load(output, "openvino") as pipe:
        expected = pipe("a red apple", steps=2, seed=7)
        assert opened(pipe) == [False] * 5
    for reused in (False, True):
        assert build(tiny_sources["sd1"], output, "--json") == 0
        engines = json.loads(capsys.readouterr().out)["engines"]
        assert [engine["component"] for engine in engines] == PARTS
        assert {engine["engine"] for engine in engines} == {"openvino"}
        assert {engine["reused"] for engine in engines} == {reused}

    def refuse(path: Path) -> Any:
        raise AssertionError(f"{path} was compiled")

    monkeypatch.setattr(ov, "read_onnx", refuse)
    with Pipeline.load(output, "openvino", threads=1) as pipe:
        assert opened(pipe) == [True] * 5
    with Pipeline.load(output, "openvino") as pipe:
        np.testing.assert_array_equal(pipe("a red apple", steps=2, seed=7).latents, expected.latents)


def test_sizes_compile_for_one_size(tiny_sources: dict[str, Path], output: Path, capsys: Captured) -> None:
    """With a size the models are of that size; a range leaves lengths variable."""
    assert build(tiny_sources["sd1"], output, "--width", "48") == 0
    assert "unet_step: OpenVINO model, fp32: " in capsys.readouterr().out
    with Pipeline.load(output, "openvino", fixed_size=(48, None, None)) as pipe:
        assert opened(pipe) == [True] * 5
    assert build(tiny_sources["sd1"], output, "--profile", "width=32:32:64") == 0
    with Pipeline.load(output, "openvino") as pipe:
        assert opened(pipe) == [True] * 5


def test_openvino_is_asked_for_before_anything_is_exported(
    tiny_sources: dict[str, Path], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the sentence says what to install, and there is no bundle."""

    def missing() -> Any:
        raise EngineUnavailableError('OpenVINO is not installed; install it with: pip install "latentrt[openvino]"')

    monkeypatch.setattr(openvino, "load_sdk", missing)
    assert build(tiny_sources["sd1"], tmp_path / "new") == 1
    assert 'pip install "latentrt[openvino]"' in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
