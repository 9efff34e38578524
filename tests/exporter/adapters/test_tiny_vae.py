"""A tiny autoencoder's decoder in a bundle, against diffusers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.exporter.adapters.registry import open_model
from latentrt.exporter.adapters.safety_checker import SafetyCheckerFiles
from latentrt.exporter.adapters.tiny_vae import TinyVaeFiles
from latentrt.exporter.source.opening import open_source
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import main
from latentrt.runtime.output.previews import Preview

OPTIONS: dict[str, Any] = {"steps": 5, "seed": 3, "width": 32, "height": 16, "sampler": "euler"}


@pytest.fixture(scope="module")
def directory(tiny: Any) -> Path:
    return Path(tiny.tiny_vae())


@pytest.fixture(scope="module")
def bundle(tiny: Any) -> Path:
    return Path(tiny.bundle("lcm"))


def theirs(directory: Path, latents: np.ndarray) -> np.ndarray:
    """Pixels of diffusers' autoencoder, as its pipelines decode."""
    vae = AutoencoderTiny.from_pretrained(directory)
    sample = torch.from_numpy(latents) / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        pixels = vae.decode(sample).sample
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.heavy
def test_the_tiny_decoder_draws_what_diffusers_draws(bundle: Path, directory: Path, tmp_path: Path) -> None:
    """Pictures and previews on request, from latents as the denoiser has them; the model's own stays the default."""
    seen: list[Preview] = []
    with Pipeline.load(bundle, "onnxruntime") as pipe:
        drawn = pipe("a red apple", **OPTIONS, decoder="tiny", images=2, on_preview=seen.append, preview_every=2)
        assert np.abs(drawn.images.astype(int) - theirs(directory, drawn.latents)).max() <= 1
        usual = pipe("a red apple", **OPTIONS, images=2)
        assert np.abs(usual.images.astype(int) - drawn.images).max() > 8
        np.testing.assert_array_equal(usual.images, pipe.decode(drawn.latents))
        steps = list(pipe.stream("a red apple", **OPTIONS, images=2))
        np.testing.assert_array_equal(pipe.preview(steps[1]), seen[0].images)
        assert [(each.index, each.total) for each in seen] == [(1, 5), (3, 5)]
        # With the noise of a variance-exploding sampler brought to the size that the decoder knows.
        assert [step.scale < 1 for step in steps] == [True] * 4 + [False]
        assert (
            np.abs(seen[1].images.astype(int) - theirs(directory, steps[3].latents * np.float32(steps[3].scale))).max()
            <= 1
        )
    preview, output = tmp_path / "preview.png", tmp_path / "apple.png"
    command = ["generate", str(bundle), "a red apple", "--output", str(output), "--steps", "3", "--width", "32"]
    command += ["--height", "16", "--decoder", "tiny", "--preview", str(preview), "--preview-every", "2"]
    assert main(command) == 0
    for path in (preview, output):
        with Image.open(path) as picture:
            assert picture.size == (32, 16)


@pytest.mark.heavy
def test_a_bundle_is_verified_with_its_tiny_decoder(
    bundle: Path, directory: Path, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The decoder is part of what the bundle comes from: without it the fingerprint is another."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["quality"]["vae_decoder_tiny/model.onnx"] > 60
    source, checker = tiny.source("lcm"), tiny.safety_checker()
    with_decoder = open_model(open_source(source), [SafetyCheckerFiles(checker), TinyVaeFiles(directory)])
    assert manifest["source"]["fingerprint"] == with_decoder.fingerprint
    command = ["verify", str(bundle), "--source", str(source), "--safety-checker", str(checker)]
    assert main([*command, "--tiny-vae", str(directory)]) == 0
    assert main(command) == 1
    assert "the fingerprints of the weights differ" in capsys.readouterr().err


def test_previews_come_from_the_own_decoder_where_there_is_no_other(tiny: Any) -> None:
    """A bundle without a tiny decoder refuses it for pictures, and draws previews all the same."""
    seen: list[Preview] = []
    with Pipeline.load(tiny.bundle("sd1"), "onnxruntime") as pipe:
        result = pipe("a red apple", **OPTIONS, on_preview=seen.append)
        assert not seen, "every fifth of five is the result"
        pipe("a red apple", **OPTIONS, on_preview=seen.append, preview_every=1)
        assert [each.images.shape for each in seen] == [result.images.shape] * 4
        refused: dict[str, dict[str, Any]] = {
            "the bundle has no tiny decoder; build it again with --tiny-vae": {"decoder": "tiny"},
            "decoder is 'huge', expected full or tiny": {"decoder": "huge"},
            "preview_every is 0, expected 1 or more": {"on_preview": print, "preview_every": 0},
            "preview_every is given without on_preview": {"preview_every": 2},
            "on_preview is a int, expected a function": {"on_preview": 3},
        }
        for message, options in refused.items():
            with pytest.raises(InvalidRequestError, match=message):
                pipe("a red apple", **OPTIONS, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "taesd is a 'AutoencoderKL', expected AutoencoderTiny"),
        (
            {"latent_channels": 16},
            "decodes latents of 16 channels, 2 pixels wide, but those of this model have 4 channels",
        ),
        ({"num_decoder_blocks": [1, 1, 1]}, "of 4 channels, 4 pixels wide, but"),
        ({"num_decoder_blocks": "many"}, "'num_decoder_blocks' is 'many', expected 1 to 7 whole numbers"),
        ({"num_decoder_blocks": [1, 10**5]}, r"'num_decoder_blocks' is \[1, 100000\]"),
        ({"latent_channels": 10**9}, "'latent_channels' is 1000000000, which no model has"),
        ({"scaling_factor": 0}, "'scaling_factor' is 0, expected 1e-06 to 1e"),
        ({"shift_factor": "much"}, "'shift_factor' is 'much', expected a number"),
        ({"decoder_block_out_channels": [8, 8]}, "weights of taesd do not fit its config.json"),
        ({"act_fn": "boom"}, "taesd/config.json does not describe a model"),
    ],
)
def test_a_tiny_autoencoder_that_does_not_fit(
    tiny: Any, directory: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """One sentence names what is wrong."""
    copy = Path(shutil.copytree(directory, tmp_path / "taesd"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    source = open_source(tiny.source("sd1"))
    with pytest.raises(SourceError, match=message):
        open_model(source, [TinyVaeFiles(copy)]).load_component("vae_decoder_tiny")


def test_a_directory_that_is_no_autoencoder(tiny: Any, tmp_path: Path) -> None:
    """Missing, a file, or without weights."""
    source = open_source(tiny.source("sd1"))
    with pytest.raises(SourceError, match="does not exist"):
        open_model(source, [TinyVaeFiles(tmp_path / "none")])
    with pytest.raises(SourceError, match="json is missing: a directory of an AutoencoderTiny is expected"):
        open_model(source, [TinyVaeFiles(tmp_path)])
    assert TinyVaeFiles.parse({}) is None
