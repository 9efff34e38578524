"""Files that a request names are regular, bounded and unchanged, and their tensors are those that torch reads."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.files import read_bounded, require_same, stored_tensors


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    """One byte more than allowed is too much."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"12345")
    assert read_bounded(path, "the file", 5) == b"12345"
    with pytest.raises(InvalidRequestError, match="the file has 5 bytes, expected at most 4"):
        read_bounded(path, "the file", 4)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, a pipe that nobody writes to, a missing file and an impossible name each end in one sentence."""
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("", "cannot be read: Is a directory|is no regular file"),
        ("pipe", "the file is no regular file"),
        ("none", "the file cannot be read: No such file"),
        ("a\0b", "the file cannot be read: embedded null byte"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            read_bounded(str(tmp_path / name), "the file", 10)


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    """Its hash counts, whatever the case of the digits."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    for same in (digest, digest.upper()):
        require_same(str(path), same, "the file")
    path.write_bytes(b"y")
    with pytest.raises(InvalidRequestError, match="its SHA-256 differs; give the file itself"):
        require_same(str(path), digest, "the file")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_of_torch(dtype: torch.dtype) -> None:
    """Every kind of float is read as float32, bit for bit as torch casts it; those too large become infinity."""
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, 0] = torch.finfo(dtype).max
    (found,) = stored_tensors(save({"a": values}))
    floats = found.floats()
    assert (found.name, found.shape) == ("a", (3, 4))
    assert floats is not None
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, values.float().numpy())


def test_whole_numbers_are_no_floats() -> None:
    """A tensor of another kind is listed, and has no values as floats."""
    (found,) = stored_tensors(save({"a": torch.arange(3)}))
    assert (found.kind, found.floats()) == ("I64", None)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, save({"a": torch.zeros(2)})[:-1]])
def test_a_damaged_file_is_one_line(content: bytes) -> None:
    """What the safetensors library says ends in a sentence of one line."""
    with pytest.raises(ValueError, match=r"^.+$") as caught:
        stored_tensors(content)
    assert "\n" not in str(caught.value)
