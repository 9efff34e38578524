"""Pictures to begin with, pictures that steer, LoRAs and records, all in one request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt.exporter.source.opening import open_source
from latentrt.runtime import Control, Pipeline
from latentrt.runtime.cli import main
from latentrt.runtime.images.png import read_text
from latentrt.runtime.inputs.request_file import KEYWORD

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def lora(tiny: Any, lora_files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for U-Net and text encoder."""
    path = tmp_path_factory.mktemp("loras") / "style.safetensors"
    return Path(lora_files.write(lora_files.peft(open_source(tiny.source("sd1"))), path))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture in a file."""
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)).save(path)
    return path


def draw(pipe: Pipeline, picture: Path) -> NDArray[np.uint8]:
    control = [Control(picture, "edges"), Control(picture, "depth", scale=0.5)]
    more: dict[str, Any] = {"control": control, "ip_adapter_image": picture, "image": picture, "strength": 0.7}
    return pipe("a red apple", seed=3, steps=4, sampler="euler", **more).images


def test_loras_change_what_pictures_steer(tiny: Any, lora: Path, picture: Path) -> None:
    """The graph that ControlNets act on has a LoRA's weights, was it opened before or after, and loses them again."""
    bundle = tiny.controlled("sd1")
    with Pipeline.load(bundle, "onnxruntime") as pipe:
        plain = draw(pipe, picture)
    with Pipeline.load(bundle, "onnxruntime", loras=[lora], loop="plain") as whole:
        expected = draw(whole, picture)
    assert np.abs(plain.astype(int) - expected).max() > 8
    with Pipeline.load(bundle, "onnxruntime") as pipe:
        pipe.set_loras([lora])
        changed = draw(pipe, picture)  # opens the graph
        assert np.abs(changed.astype(int) - expected).max() <= 1
        pipe.set_loras([])
        np.testing.assert_array_equal(draw(pipe, picture), plain)
        pipe.set_loras([lora])  # opens it anew
        np.testing.assert_array_equal(draw(pipe, picture), changed)


def test_everything_is_drawn_again(
    tiny: Any, lora: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PNG says all that it was drawn with, repeats it bit for bit, and refuses where a picture is another now."""
    bundle, first, again = str(tiny.controlled("sd1")), tmp_path / "a.png", tmp_path / "b.png"
    command = ["generate", bundle, "a red apple", "--output", str(first), "--steps", "4", "--image", str(picture)]
    command += ["--strength", "0.7", "--control", f"edges={picture}:0.5:0:0.8", "--lora", f"{lora}:0.5"]
    command += ["--ip-adapter-image", str(picture), "--ip-adapter-scale", "0.6", "--variation-seed", "5"]
    assert main([*command, "--variation-strength", "0.25"]) == 0
    assert main(["generate", bundle, "--from", str(first), "--output", str(again)]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    assert read_text(first, KEYWORD) == read_text(again, KEYWORD)
    again.unlink()
    capsys.readouterr()
    Image.new("RGB", (32, 24)).save(picture)
    assert main(["generate", bundle, "--from", str(first), "--output", str(again)]) == 2
    error = capsys.readouterr().err
    assert "its SHA-256 differs" in error
    assert error.count("\n") == 1
    assert not again.exists()
