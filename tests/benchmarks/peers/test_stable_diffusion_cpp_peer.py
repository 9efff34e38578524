"""What is handed to stable-diffusion.cpp, and what is refused before it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.checkpoints.stable_diffusion import CONFIGS as SIZES
from latentrt.benchmarks.peers import stable_diffusion_cpp_peer as peer
from latentrt.benchmarks.peers.wire import UnsupportedError

JOB = {
    "device": "cpu",
    "sampler": "euler",
    "width": 512,
    "height": 512,
    "prompt": "a red apple",
    "negative_prompt": "",
    "options": {},
}
CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = {
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
}


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("sampler", CLASSES)
def test_noise_levels_are_those_of_diffusers(sampler: str, spacing: str, offset: int, steps: int) -> None:
    """The levels handed over are the ``sigmas`` of the class of diffusers, to rounding in float32."""
    diffusers = pytest.importorskip("diffusers")
    config = {**CONFIG, "timestep_spacing": spacing, "steps_offset": offset}
    scheduler = getattr(diffusers, CLASSES[sampler]).from_config(config)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(peer.sigmas(config, sampler, steps), scheduler.sigmas.numpy(), rtol=2e-5)


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_noise_levels_of_ddim_are_those_of_its_timesteps(spacing: str, one: bool) -> None:
    """DDIM's levels are the square root of (1 - a) / a, a the class's cumulative product at each of its timesteps."""
    diffusers = pytest.importorskip("diffusers")
    config = {**CONFIG, "timestep_spacing": spacing, "steps_offset": 1, "set_alpha_to_one": one}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(7)
    products = [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), float(scheduler.final_alpha_cumprod)]
    expected = [((1 - product) / product) ** 0.5 for product in products]
    np.testing.assert_allclose(peer.sigmas(config, "ddim", 7), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_end": 0.02}, "beta_end is 0.012, the checkpoint's is 0.02"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"prediction_type": "sample"}, "no prediction_type 'sample'"),
        ({"timestep_spacing": "beta"}, "timestep_spacing is 'beta'"),
    ],
)
def test_schedule_that_it_has_not_got_is_unsupported(change: dict[str, Any], message: str) -> None:
    """A schedule other than the one compiled in, or one that is not made here, is refused."""
    with pytest.raises(UnsupportedError, match=message):
        peer.sigmas({**CONFIG, **change}, "euler", 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "unipc"}, "has no sampler 'unipc'"),
        ({"device": "cuda"}, "runs on processors only"),
        ({"width": 520}, "multiples of 64"),
        ({"prompt": "a (red) apple"}, r"reads \( \) in a prompt as weights"),
    ],
)
def test_job_that_it_would_read_otherwise_is_unsupported(change: dict[str, Any], message: str) -> None:
    """Samplers, devices, sizes and prompts that mean something else to it are refused in a sentence."""
    peer.check_job(JOB)
    with pytest.raises(UnsupportedError, match=message):
        peer.check_job({**JOB, **change})


def test_sizes_other_than_stable_diffusions_are_unsupported(emoji_source: Path) -> None:
    """A checkpoint of other channel counts is refused with the first that differs, before the library sees it."""
    with pytest.raises(UnsupportedError, match=r"unet \w+ is .+, expected"):
        peer.Contender().open({**JOB, "steps": 2, "source": str(emoji_source)})


def test_sizes_of_stable_diffusion_are_taken(tmp_path: Path) -> None:
    """Configs as diffusers and transformers write them for Stable Diffusion 1.5's sizes pass; one change does not."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    blocks = (128, 256, 512, 512)
    ups, downs = ("UpDecoderBlock2D",) * 4, ("DownEncoderBlock2D",) * 4
    vae = {"block_out_channels": blocks, "layers_per_block": 2, "up_block_types": ups, "down_block_types": downs}
    with torch.device("meta"):
        diffusers.UNet2DConditionModel(**SIZES["sd15"]).save_config(tmp_path / "unet")
        diffusers.AutoencoderKL(**vae).save_config(tmp_path / "vae")
    transformers.CLIPTextConfig(hidden_size=768, num_hidden_layers=12).save_pretrained(tmp_path / "text_encoder")
    peer.check_checkpoint(tmp_path)
    transformers.CLIPTextConfig(hidden_size=1024).save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(UnsupportedError, match="text_encoder hidden_size is 1024, expected 768"):
        peer.check_checkpoint(tmp_path)


def test_steps_of_all_pictures_are_added() -> None:
    """Each step's seconds are summed over the pictures, without what lies between two of them."""
    first = [(0, 10.0), (1, 11.0), (2, 13.0)]
    second = [(0, 20.0), (1, 21.5), (2, 24.0)]
    assert peer.step_seconds([*first, *second], 2) == [2.5, 4.5]


def test_tokenizer_of_another_size_is_seen(emoji_source: Path) -> None:
    """The number of tokens is the one that transformers counts."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(emoji_source / "tokenizer")
    assert peer.tokenizer_size(emoji_source) == len(tokenizer) != 49408


def test_vocabulary_file_is_counted(tmp_path: Path) -> None:
    """Older checkpoints have their tokens in ``vocab.json``."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2}))
    assert peer.tokenizer_size(tmp_path) == 3
