"""Directories are opened without trust: files that are missing, damaged or no JSON end in one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from latentrt.exporter.source.opening import open_source

EditJson = Callable[..., None]
Refusal = Callable[..., str]
UNET = "unet/diffusion_pytorch_model.safetensors"


def test_no_directory(tmp_path: Path, refusal: Refusal) -> None:
    """A missing directory, a file, and a directory of something else are told apart."""
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    assert "is a file" in refusal(tmp_path / "file")
    assert "model_index.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read"),
    ],
    ids=["empty", "cut", "not-text", "deep", "list", "null", "long-number"],
)
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_broken_json(tiny_source: Path, file: str, content: bytes, expected: str, refusal: Refusal) -> None:
    """A configuration that is no JSON object is named."""
    (tiny_source / file).write_bytes(content)
    message = refusal(tiny_source)
    assert expected in message
    assert Path(file).name in message


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", UNET])
def test_missing_file(tiny_source: Path, file: str, refusal: Refusal) -> None:
    """A file that is missing is named."""
    (tiny_source / file).unlink()
    assert f"{file} is missing" in refusal(tiny_source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a Unix thing")
def test_pipe_for_a_file(tiny_source: Path, refusal: Refusal) -> None:
    """A named pipe in place of a configuration is refused rather than waited for."""
    (tiny_source / "unet" / "config.json").unlink()
    os.mkfifo(tiny_source / "unet" / "config.json")
    assert "no regular file" in refusal(tiny_source)


def test_fingerprint(tiny_source: Path, edit_json: EditJson) -> None:
    """The fingerprint follows weights, configurations, tokenizer and scheduler, and nothing else."""
    seen = {open_source(tiny_source).fingerprint}
    (tiny_source / "README.md").write_text("---\nlicense: mit\n---\n")
    assert {open_source(tiny_source).fingerprint} == seen
    edit_json(tiny_source / "unet" / "config.json", norm_eps=1e-6)
    seen.add(open_source(tiny_source).fingerprint)
    edit_json(tiny_source / "scheduler" / "scheduler_config.json", steps_offset=0)
    seen.add(open_source(tiny_source).fingerprint)
    edit_json(tiny_source / "tokenizer" / "tokenizer_config.json", model_max_length=70)
    seen.add(open_source(tiny_source).fingerprint)
    tensors = load_file(tiny_source / UNET)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, tiny_source / UNET)
    seen.add(open_source(tiny_source).fingerprint)
    assert len(seen) == 5
