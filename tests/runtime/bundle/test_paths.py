"""Paths that a bundle may name, and files that are its own."""

from __future__ import annotations

import ntpath
import os
import posixpath
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.errors import BundleError, BundleIntegrityError
from latentrt.runtime.bundle.paths import check_path, check_text, plain_file


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/etc/passwd",
            "..",
            "a/../b",
            "./a",
            "a//b",
            "a/",
            "",
            "a\\b",
            "C:/x",
            "C:x",
            "a\0b",
            "a\nb",
            "con",
            "a/NUL.txt",
        ),
        *("a.", "a ", " a", "*/_ORT_MEM_ADDR_/*", "x" * 256, "a/" * 600 + "a", "\u202ea", "a?", 5, None, ["a"]),
    ],
    ids=lambda path: repr(path)[:20],
)
def test_paths_refused(path: object) -> None:
    """Paths that leave the bundle, or mean something else on another system, are refused by name of their key."""
    with pytest.raises(BundleError, match=r"^the key "):
        check_path(path, "the key")


@pytest.mark.parametrize("path", ["a", "unet/model.onnx.data", ".hidden", "a b/ä-1_2+3.txt", "console", "..a"])
def test_paths_taken(path: str) -> None:
    """Plain paths are taken as they are."""
    assert check_path(path, "key") == path


@settings(max_examples=500, deadline=None)
@given(path=st.text(alphabet="abC.:/\\ ~*\0", max_size=12))
def test_taken_paths_stay_inside(path: str) -> None:
    """Whatever is taken stays below the bundle by the rules of both POSIX and Windows."""
    try:
        check_path(path, "key")
    except BundleError:
        return
    assert posixpath.normpath(posixpath.join("/bundle", path)) == f"/bundle/{path}"
    joined = ntpath.normpath(ntpath.join("D:\\bundle", path))
    assert joined == "D:\\bundle\\" + path.replace("/", "\\")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_special_files(tmp_path: Path) -> None:
    """A named pipe, which would block for ever, and a directory are not files; neither is a file a directory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    for name in ("pipe", "directory"):
        with pytest.raises(BundleIntegrityError, match="is not a regular file"):
            plain_file(tmp_path, name)
    with pytest.raises(BundleIntegrityError, match="is not a directory"):
        plain_file(tmp_path, "file/below")
    with pytest.raises(BundleIntegrityError, match="lacks the file 'missing'"):
        plain_file(tmp_path, "missing")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(5, "a text"), ("", "a text that is not empty"), ("long", "at most 3 characters"), ("\ud800", "valid Unicode")],
)
def test_texts_refused(value: object, expected: str) -> None:
    """The message names the key and what is expected of it."""
    with pytest.raises(BundleError, match=rf"^key is .*, expected {expected}$"):
        check_text(value, "key", limit=3)
    assert check_text("", "key", empty=True) == ""
