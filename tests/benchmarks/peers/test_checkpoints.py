"""Conversions of a checkpoint: what they are known by, and tensors under other names."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latentrt.benchmarks.peers.checkpoints import (
    fingerprint,
    folder_bytes,
    has_nested_names,
    nest_text_encoder,
    rename_tensors,
    run_tool,
)


def test_another_checkpoint_has_another_fingerprint(tmp_path: Path) -> None:
    """The fingerprint changes with the checkpoint's files and with the converter's version, and with nothing else."""
    for name in ("one", "two"):
        _write(tmp_path / name / "unet" / "weights", "1")
    one = tmp_path / "one"
    before = fingerprint(one, "1.0")
    assert fingerprint(one, "1.0") == before
    assert fingerprint(one, "1.1") != before
    assert fingerprint(tmp_path / "two", "1.0") != before
    _write(one / "unet" / "weights", "12")
    assert fingerprint(one, "1.0") != before


def test_tool_that_fails_is_named_with_its_last_lines() -> None:
    """A converter that ends with an error is told by name, status and what it said last."""
    with pytest.raises(RuntimeError, match="the tool ended with status 3: out of luck"):
        run_tool("the tool", [sys.executable, "-c", "print('out of luck'); raise SystemExit(3)"], {})


def test_tool_is_given_its_environment_and_what_it_prints_comes_back() -> None:
    """Both streams of a converter are returned, and it sees the variables that it is given."""
    program = "import os, sys; print(os.environ['GIVEN']); print('errors', file=sys.stderr)"
    text = run_tool("the tool", [sys.executable, "-c", program], {"GIVEN": "value"})
    assert sorted(text.split()) == ["errors", "value"]


def test_renamed_tensors_are_the_same_tensors(tmp_path: Path) -> None:
    """safetensors reads the same numbers, types and shapes from the renamed file, under the new names."""
    numbers = np.random.default_rng(0)
    tensors = {
        "a": numbers.standard_normal((3, 5)).astype(np.float16),
        "bb.weight": numbers.standard_normal((2, 2, 2)).astype(np.float32),
        "odd": np.arange(7, dtype=np.uint8),
    }
    save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt"})
    for prefix in ("x", "xy.", "text_model."):  # headers of lengths that leave different gaps
        rename_tensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors", lambda name, p=prefix: p + name)  # type: ignore[misc]
        read = load_file(tmp_path / "out.safetensors")
        assert set(read) == {prefix + name for name in tensors}
        for name, tensor in tensors.items():
            assert read[prefix + name].dtype == tensor.dtype
            np.testing.assert_array_equal(read[prefix + name], tensor)


def test_names_that_would_collide_are_refused(tmp_path: Path) -> None:
    """Two tensors are never given one name."""
    save_file({"a": np.zeros(1), "b": np.zeros(1)}, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match="two tensors would have the same name"):
        rename_tensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors", lambda _: "same")
    assert not (tmp_path / "out.safetensors").exists()


def test_text_encoder_gets_the_names_that_older_readers_know(tmp_path: Path) -> None:
    """Every tensor of the text encoder lies below ``text_model.`` afterwards, and all else is the checkpoint's own."""
    source, target = tmp_path / "source", tmp_path / "target"
    for part in ("text_encoder", "unet"):
        (source / part).mkdir(parents=True)
        _write(source / part / "config.json", part)
    tensors = {"embeddings.weight": np.arange(4.0), "text_model.final_layer_norm.bias": np.ones(2)}
    save_file(tensors, source / "text_encoder" / "model.safetensors")
    save_file({"conv_in.weight": np.zeros(3)}, source / "unet" / "weights.safetensors")
    target.mkdir()
    assert not has_nested_names(source)
    nest_text_encoder(source, target)
    assert has_nested_names(target)
    read = load_file(target / "text_encoder" / "model.safetensors")
    assert set(read) == {"text_model.embeddings.weight", "text_model.final_layer_norm.bias"}
    np.testing.assert_array_equal(read["text_model.embeddings.weight"], np.arange(4.0))
    assert (target / "unet" / "weights.safetensors").samefile(source / "unet" / "weights.safetensors")
    assert (target / "text_encoder" / "config.json").read_text() == "text_encoder"
    assert folder_bytes(target / "unet") == folder_bytes(source / "unet") > 4


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
