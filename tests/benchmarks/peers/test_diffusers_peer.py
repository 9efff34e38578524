"""diffusers as a peer: its images are the pipeline's, and compiled code is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.peers import diffusers_peer, wire


def psnr(picture: Any, expected: Any) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB."""
    error = np.mean((picture.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.fixture
def threads() -> Iterator[None]:
    """PyTorch's number of threads is put back: a contender has a process to itself, but not here."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_diffusers_draws_what_diffusers_draws(
    peer_job: dict[str, Any], tiny_sources: dict[str, Path], tmp_path: Path
) -> None:
    """Its program draws the pipeline's own picture, as many as asked for, and tells the seconds of the stages."""
    import diffusers
    import torch

    contender = diffusers_peer.Contender()
    job = peer_job | {"source": str(tiny_sources["sd1"]), "workspace": str(tmp_path)}
    with pytest.raises(wire.UnsupportedError, match="'flow-euler'"):
        contender.open(job | {"sampler": "flow-euler"})
    opened = contender.open(job)
    assert torch.get_num_threads() == 1
    assert opened["versions"]["diffusers"] == diffusers.__version__
    assert opened["disk_bytes"] == sum(file.stat().st_size for file in tiny_sources["sd1"].rglob("*.safetensors"))
    answer = contender.draw({"picture": str(tmp_path / "x.npy"), "images": None, "steps": None}, job)
    assert len(answer["steps"]) == 2
    assert min(answer["steps"]) > 0
    stages = answer["text_encoder"] + sum(answer["steps"]) + answer["vae_decoder"]
    assert 0.5 * answer["total"] < stages < answer["total"]
    two = contender.draw({"picture": str(tmp_path / "two.npy"), "images": 2, "steps": 3}, job)
    assert len(two["steps"]) == 3
    assert json.loads(json.dumps([opened, answer, two])) == [opened, answer, two]
    contender.close()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_sources["sd1"], local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for name, images, steps in (("x", 1, 2), ("two", 2, 3)):
        expected = pipe(
            "a red apple",
            negative_prompt="a green leaf",
            width=32,
            height=32,
            num_inference_steps=steps,
            guidance_scale=4.0,
            num_images_per_prompt=images,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        ).images
        picture = np.load(tmp_path / f"{name}.npy")
        assert (picture.dtype, picture.shape) == (np.uint8, (images, 32, 32, 3))
        assert psnr(picture, np.round(expected * 255)) > 45


def test_code_of_an_interrupted_compilation_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile kept is found again, unless a draw did not end; two processes never share a folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")

    def open_cache() -> tuple[diffusers_peer.CompileCache, str, Path]:
        cache = diffusers_peer.CompileCache(tmp_path, "key")
        return cache, cache.open(), Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    def end_process(cache: diffusers_peer.CompileCache) -> None:
        assert cache._lock is not None
        os.close(cache._lock)

    first, note, folder = open_cache()
    assert "its cache was empty" in note
    other, note, apart = open_cache()
    assert "its cache was empty" in note
    assert folder.parent.parent == tmp_path
    assert not apart.is_relative_to(tmp_path)
    end_process(other)
    with first.in_use():
        folder.mkdir()
        (folder / "code.so").touch()
    end_process(first)
    second, note, again = open_cache()
    assert "held code from before" in note
    assert (again / "code.so").exists()
    with pytest.raises(KeyboardInterrupt), second.in_use():
        raise KeyboardInterrupt
    end_process(second)
    third, note, last = open_cache()
    assert "its cache was empty" in note
    assert last == folder
    assert not last.exists()
    end_process(third)
