"""Stable Diffusion XL at the command line and in the cache; its pictures are in test_parity_families.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines import Array
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import main
from latentrt.runtime.images.png import read_parameters

pytestmark = pytest.mark.heavy
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(tiny: Any) -> Path:
    """The tiny bundle, not to be changed."""
    return Path(tiny.bundle("sdxl"))


def test_the_file_says_how_it_was_made(bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    """Second prompts, sizes and crop of the command line reach the request, and the PNG carries what was given."""
    output = tmp_path / "o.png"
    options = ["--prompt-2", "a rocket", "--negative-prompt-2", "a leaf", "--original-size", "96x64", "--crop", "8,0"]
    options += ["--negative-original-size", "16x8", "--negative-target-size", "24x16", "--seed", "7", "--steps", "1"]
    assert main(["generate", str(bundle), "a red apple", "--output", str(output), "--json", *options]) == 0
    request = json.loads(capsys.readouterr().out)["request"]
    assert (request["prompt_2"], request["negative_prompt_2"]) == ("a rocket", "a leaf")
    assert (request["original_size"], request["crop"], request["target_size"]) == ([96, 64], [8, 0], None)
    text = read_parameters(output) or ""
    assert "Prompt 2: a rocket, Negative prompt 2: a leaf, Original size: 96x64, Crop: 8 0" in text
    assert "Negative original size: 16x8, Negative target size: 24x16" in text
    assert "Target size: None" not in text


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--original-size", "96", "as 1024x768"), ("--target-size", "axb", "as 1024x768"), ("--crop", "-1,0", "as 0,64")],
)
def test_sizes_that_are_none(bundle: Path, capsys: Captured, option: str, value: str, expected: str) -> None:
    """What is no size or place is refused with an example of one."""
    assert main(["generate", str(bundle), "a red apple", "--output", "o.png", f"{option}={value}"]) == 2
    assert f"'{value}' is not understood" in (error := capsys.readouterr().err)
    assert expected in error


def test_inspect_names_family_and_abilities(bundle: Path, capsys: Captured) -> None:
    """The family, the kind of guidance, options of its own, and settings."""
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "sdxl: stable-diffusion-xl, epsilon, licence unknown" in out
    (line,) = [line for line in out.splitlines() if line.startswith("abilities: ")]
    assert line.startswith("abilities: guidance classifier-free, options clip_skip crop negative_crop ")
    assert line.endswith(" target_size, force zeros for empty prompt: true")
    assert main(["inspect", str(bundle), "--json"]) == 0
    abilities = json.loads(capsys.readouterr().out)["abilities"]
    assert abilities["force_zeros_for_empty_prompt"] is True
    assert "prompt_2" in abilities["options"]


def test_another_size_does_not_encode_a_text_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes enter behind text encoders and prompt stage, and a picture from the cache is that of a new pipeline."""
    options = {"steps": 2, "seed": 7, "original_size": (96, 64), "target_size": (48, 40)}
    with Pipeline.load(bundle, "onnxruntime") as pipe:
        pipe("a red apple", steps=2, seed=7)
        run, calls = pipe.engines["text_encoder_2"].run, []

        def counted(feeds: dict[str, Array]) -> dict[str, Array]:
            calls.append(feeds)
            return run(feeds)

        monkeypatch.setattr(pipe.engines["text_encoder_2"], "run", counted)
        again = pipe("a red apple", **options)
        assert (calls, again.timings.prompt) == ([], 0)
        pipe("a red apple", prompt_2="a rocket", **options)
        assert len(calls) == 1, "the negative prompt is zeros"
    with Pipeline.load(bundle, "onnxruntime", prompt_cache=0) as pipe:
        np.testing.assert_array_equal(pipe("a red apple", **options).images, again.images)
