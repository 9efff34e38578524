"""Bundles are opened only if every file is the one that was written."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import BundleError, BundleIntegrityError, BundleVersionError
from latentrt.runtime.bundle import reader as bundle_module
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.bundle.writer import write_bundle


def test_write_and_open(small: Any, target: Path) -> None:
    """A committed bundle opens, lists all its files, and its graph opens in ONNX Runtime."""
    opened = Bundle.open(target, verify_hash=True)
    assert sorted(opened.manifest.files) == ["tokenizer/tokenizer.json", "unet/model.onnx", "unet/model.onnx.data"]
    assert opened.graph("unet", small.FORM) == small.GRAPH
    assert opened.engines_directory == target / "engines"
    assert small.names(target.parent) == ["emoji"]
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        str(opened.graph_path("unet", small.FORM)), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros((4, 8), np.float32)})[0], np.ones((4, 8)))


def test_same_content_same_manifest(small: Any, tmp_path: Path) -> None:
    """Two bundles of the same content have the same bytes in bundle.json."""
    first, second = (small.build(tmp_path / name) / "bundle.json" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_open_through_a_link(small: Any, target: Path) -> None:
    """The bundle itself may be reached through a symbolic link."""
    link = target.with_name("link")
    link.symlink_to(target)
    assert small.value_of(link) == 1
    assert Bundle.open(str(link)).path == target


def test_graph_is_guarded_once(small: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is read at the first use and not again, by however many threads."""
    calls = []
    monkeypatch.setattr(bundle_module, "check_graph", lambda root, graph: calls.append(graph))
    opened = Bundle.open(target)
    threads = [threading.Thread(target=opened.graph_path, args=("unet", small.FORM)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [small.GRAPH]


def test_unknown_names(small: Any, target: Path) -> None:
    """Asking for what the bundle lacks is answered with what it has."""
    opened = Bundle.open(target)
    with pytest.raises(BundleError, match="no component 'vae'; it has unet"):
        opened.graph("vae", small.FORM)
    with pytest.raises(BundleError, match=f"no form 'fp8'; it has {small.FORM}"):
        opened.graph_path("unet", "fp8")
    with pytest.raises(BundleError, match=r"does not list the file 'notes\.txt'"):
        opened.file("notes.txt")


def test_not_a_bundle(tmp_path: Path) -> None:
    """A missing directory, a file, an empty directory, a loop of links and an impossible name are told apart."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, message in [
        ("missing", "does not exist"),
        ("file", "is a file"),
        ("empty", r"has no bundle\.json"),
        ("loop", "cannot be read"),
    ]:
        with pytest.raises(BundleError, match=message):
            Bundle.open(tmp_path / name)
    with pytest.raises(BundleError):
        Bundle.open("a\0b")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[" * 100_000, b"{" + b" " * (5 << 20)])
def test_broken_manifest(target: Path, content: bytes) -> None:
    """Whatever is in bundle.json, opening ends in one sentence that names it."""
    (target / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"emoji/bundle\.json"):
        Bundle.open(target)


def test_newer_bundle(target: Path) -> None:
    """A bundle of a newer format is not opened, and the way out is named."""
    path = target / "bundle.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(BundleVersionError, match="upgrade latentrt"):
        Bundle.open(target)


def test_wrong_hash(small: Any, target: Path) -> None:
    """A changed file of the same size is found when hashes are asked for, the first by name of two."""
    for relative in (small.GRAPH.external[0], "tokenizer/tokenizer.json"):
        path = target / relative
        path.write_bytes(path.read_bytes()[::-1] if relative.endswith("json") else bytes(path.stat().st_size))
    assert Bundle.open(target)
    with pytest.raises(BundleIntegrityError, match=r"tokenizer\.json has the SHA-256"):
        Bundle.open(target, verify_hash=True)


def test_missing_and_truncated_files(small: Any, target: Path) -> None:
    """A file that is missing or has another size is found without hashing."""
    path = target / small.GRAPH.external[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleIntegrityError, match=r"has 127 bytes, but the manifest says 128"):
        Bundle.open(target)
    path.unlink()
    with pytest.raises(BundleIntegrityError, match=r"lacks the file 'unet/model\.onnx\.data'"):
        Bundle.open(target)


def test_unlisted_files_are_tolerated(small: Any, target: Path) -> None:
    """Notes and engines beside the listed files do not matter."""
    (target / "notes.txt").write_text("mine")
    (target / "engines" / "abc").mkdir(parents=True)
    (target / "engines" / "abc" / "plan").write_bytes(b"x")
    assert small.value_of(target) == 1


def test_graph_that_names_an_unlisted_file(small: Any, tmp_path: Path) -> None:
    """An unlisted file is refused as soon as a graph names it, even though it lies in the bundle."""
    with write_bundle(tmp_path / "b") as writer:
        small.fill(writer, external="other.data")
        writer.commit(small.MANIFEST)
    (tmp_path / "b" / "unet" / "other.data").write_bytes(bytes(128))
    opened = Bundle.open(tmp_path / "b", verify_hash=True)
    with pytest.raises(BundleIntegrityError, match=r"'unet/other\.data', which the manifest does not list"):
        opened.graph_path("unet", small.FORM)


def test_truncated_graph(small: Any, target: Path) -> None:
    """A graph that changed since the bundle was opened is refused before an SDK sees it."""
    opened = Bundle.open(target)
    path = target / small.GRAPH.file
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BundleIntegrityError, match="bytes, but the manifest says"):
        opened.graph_path("unet", small.FORM)


@pytest.mark.parametrize("relative", ["bundle.json", "unet/model.onnx", "tokenizer/tokenizer.json", "unet"])
def test_links_in_a_bundle(target: Path, relative: str) -> None:
    """No file or directory of a bundle may be a symbolic link, not even to the same content."""
    moved = target.with_name("moved")
    (target / relative).rename(moved)
    (target / relative).symlink_to(moved)
    with pytest.raises(BundleIntegrityError, match="symbolic link"):
        Bundle.open(target)


def test_hard_links_in_a_bundle(small: Any, target: Path) -> None:
    """No file of a bundle may have a second name."""
    os.link(target / small.GRAPH.file, target.with_name("second"))
    with pytest.raises(BundleIntegrityError, match="hard link"):
        Bundle.open(target)
