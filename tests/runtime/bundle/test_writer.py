"""Bundles are written whole or not at all."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.errors import BundleError, BundleIntegrityError, OutputError
from latentrt.runtime.bundle import writer as writer_module
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.bundle.writer import BundleWriter, write_bundle

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@pytest.fixture(params=["exchange", "two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Replace bundles in one step, and as on systems that cannot."""
    if request.param == "two steps":
        monkeypatch.setattr(writer_module, "_renameat2", lambda: None)
    elif not sys.platform.startswith("linux"):
        pytest.skip("needs renameat2")
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_replace(small: Any, target: Path) -> None:
    """An older bundle is replaced as a whole, engines and notes included, and nothing is left beside it."""
    (target / "notes.txt").write_text("mine")
    small.build(target, 2)
    assert small.value_of(target) == 2
    assert small.names(target) == ["bundle.json", "tokenizer", "unet"]
    assert small.names(target.parent) == ["emoji"]


def test_replace_through_a_link(small: Any, target: Path) -> None:
    """Writing to a link replaces the bundle behind it and keeps the link."""
    link = target.with_name("link")
    link.symlink_to("emoji")
    small.build(link, 3)
    assert link.is_symlink()
    assert small.value_of(target) == 3


def test_empty_directory_and_missing_parents(small: Any, tmp_path: Path) -> None:
    """An empty directory is taken as a target, and missing parents are made."""
    (tmp_path / "empty").mkdir()
    assert small.value_of(small.build(tmp_path / "empty", 4)) == 4
    assert small.value_of(small.build(tmp_path / "a" / "b" / "c", 5)) == 5


def test_permissions(small: Any, tmp_path: Path) -> None:
    """A bundle is as readable as any directory that this process makes."""
    (tmp_path / "plain").mkdir()
    assert small.build(tmp_path / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["file", "directory", "foreign manifest", "below a file"])
def test_target_of_another_kind(small: Any, tmp_path: Path, kind: str) -> None:
    """A file, or a directory with anything but a bundle, is refused and left as it was."""
    target = kept = tmp_path / "target"
    if kind == "file":
        target.write_text("precious")
    elif kind == "below a file":
        target.write_text("precious")
        target = target / "below"
    else:
        target.mkdir()
        kept = target / ("bundle.json" if kind == "foreign manifest" else "thesis.txt")
        kept.write_text('{"name": "web page"}')
    before = kept.read_text()
    with pytest.raises(OutputError, match="left alone"), write_bundle(target):
        raise AssertionError("not reached")
    assert kept.read_text() == before
    assert small.names(tmp_path) == ["target"]


def test_target_that_appears_meanwhile(small: Any, tmp_path: Path) -> None:
    """What came to be at the target while the bundle was written is not overwritten either."""
    target = tmp_path / "b"

    def appear(writer: BundleWriter) -> None:
        target.mkdir()
        (target / "thesis.txt").write_text("precious")

    with pytest.raises(OutputError, match="left alone"):
        small.build(target, extra=appear)
    assert small.names(target) == ["thesis.txt"]
    assert small.names(tmp_path) == ["b"]


class Interruption(BaseException):
    """Stands for KeyboardInterrupt."""


@pytest.mark.parametrize("error", [ValueError, Interruption])
def test_exception_while_writing(small: Any, target: Path, error: type[BaseException]) -> None:
    """An exception passes through unchanged, the temporary directory goes, the older bundle stays."""

    def fail(writer: BundleWriter) -> None:
        assert len(small.names(target.parent)) == 2
        raise error("mine")

    with pytest.raises(error, match="mine"):
        small.build(target, 2, fail)
    assert small.names(target.parent) == ["emoji"]
    assert small.value_of(target) == 1


def test_leaving_without_commit(small: Any, target: Path) -> None:
    """Without a commit nothing happens."""
    with write_bundle(target) as writer:
        small.fill(writer, 9)
    assert small.names(target.parent) == ["emoji"]
    assert small.value_of(target) == 1


def test_commit_twice(small: Any, tmp_path: Path) -> None:
    """A second commit is refused, and the first stands."""
    with write_bundle(tmp_path / "b") as writer:
        small.fill(writer, 1)
        writer.commit(small.MANIFEST)
        with pytest.raises(BundleError, match="committed already"):
            writer.commit(small.MANIFEST)
    assert small.value_of(tmp_path / "b") == 1


def test_commit_checks_what_it_writes(small: Any, target: Path) -> None:
    """A manifest that names a missing file, a link, and a bundle.json of one's own are refused at commit."""
    with pytest.raises(BundleError, match="which files does not list"), write_bundle(target) as writer:
        writer.commit(small.MANIFEST)
    with pytest.raises(BundleIntegrityError, match="symbolic link"):
        small.build(target, 2, lambda writer: (writer.directory / "link").symlink_to("/etc/hostname"))
    with pytest.raises(BundleIntegrityError, match="hard link"):
        small.build(target, 2, lambda writer: os.link(writer.directory / small.GRAPH.file, writer.directory / "second"))
    with pytest.raises(BundleError, match="written by commit"):
        small.build(target, 2, lambda writer: (writer.directory / "bundle.json").write_text("{}"))
    assert small.value_of(target) == 1
    assert small.names(target.parent) == ["emoji"]


def test_engines_written_along(small: Any, tmp_path: Path) -> None:
    """Engines put into a bundle before commit come along, unlisted."""
    with write_bundle(tmp_path / "b") as writer:
        small.fill(writer)
        (writer.directory / "engines" / "key").mkdir(parents=True)
        (writer.directory / "engines" / "key" / "engine.plan").write_bytes(b"plan")
        written = writer.commit(small.MANIFEST)
    opened = Bundle.open(tmp_path / "b", verify_hash=True)
    assert opened.manifest == written
    assert not any("engines" in path for path in opened.manifest.files)
    assert (opened.engines_directory / "key" / "engine.plan").read_bytes() == b"plan"


@linux
@pytest.mark.parametrize("place", ["/proc/latentrt/bundle", "/dev/null/bundle", "/" + "x" * 300 + "/b", "a\0b"])
def test_unwritable_place(place: str) -> None:
    """A place where nothing can be written is refused in one sentence."""
    with pytest.raises(OutputError) as caught, write_bundle(place):
        raise AssertionError("not reached")
    assert "\n" not in str(caught.value)


def test_errors_of_the_caller(small: Any, target: Path) -> None:
    """Errors of reading elsewhere stay what they are; errors of writing the bundle are translated."""
    with pytest.raises(FileNotFoundError) as caught, write_bundle(target):
        Path("/nowhere/source").read_bytes()
    assert not isinstance(caught.value, OutputError)
    with pytest.raises(OutputError, match="could not be written") as caught, write_bundle(target) as writer:
        (writer.directory / "missing" / "file").write_bytes(b"x")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(OutputError, match="free some space"), write_bundle(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert small.value_of(target) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small: Any, small_disk: Path) -> None:
    """A disk that fills while files are written, or at commit, leaves the older bundle and nothing else."""
    target = small.build(small_disk / "b", 1)
    with pytest.raises(OutputError, match="free some space"), write_bundle(target) as writer:
        (writer.directory / "large").write_bytes(bytes(1 << 20))
    assert small.names(small_disk) == ["b"]

    def fill_the_disk(writer: BundleWriter) -> None:
        with suppress(OSError), (writer.directory / "rest").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))

    with pytest.raises(OutputError, match="free some space"):
        small.build(target, 2, fill_the_disk)
    assert small.names(small_disk) == ["b"]
    assert small.value_of(target) == 1


# --- killed and concurrent writers

CHILD = """
import importlib.util, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("helpers", {file!r})
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
from latentrt.runtime.bundle import writer
if {two_steps!r}:
    writer._renameat2 = lambda: None
target = Path({target!r})
{body}
"""


def child(target: Path, body: str, two_steps: bool = False) -> subprocess.Popen[str]:
    code = CHILD.format(
        file=str(Path(__file__).with_name("small_bundles.py")), target=str(target), body=body, two_steps=two_steps
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


WRITE_HALF = """
with writer.write_bundle(target) as writer:
    helpers.fill(writer, 7)
    print("ready", flush=True)
    time.sleep(600)
"""
WRITE_FOR_EVER = """
print("ready", flush=True)
while True:
    for value in (10, 11):
        helpers.build(target, value)
"""
WRITE_SOME = """
for value in range(8):
    helpers.build(target, value)
"""


@linux
def test_killed_writer(small: Any, target: Path) -> None:
    """A writer killed at work leaves the older bundle; its leftover goes with the next writer, not before its end."""
    process = child(target, WRITE_HALF)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        small.build(target, 2)
        (leftover,) = (name for name in small.names(target.parent) if name != "emoji")  # it is still at work
        assert leftover.startswith(".emoji.")
        assert leftover.endswith(".partial")
    finally:
        process.kill()
        process.communicate()
    assert small.value_of(target) == 2
    assert small.names(target.parent) == [leftover, "emoji"]
    small.build(target, 3)
    assert small.names(target.parent) == ["emoji"]


@linux
@pytest.mark.heavy
@pytest.mark.parametrize("two_steps", [False, True], ids=["exchange", "two steps"])
def test_killed_at_any_moment(small: Any, target: Path, two_steps: bool) -> None:
    """Killed at random moments of replacing, a writer leaves one whole bundle, at once or for the next writer."""
    generator = random.Random(0)
    for _ in range(6):
        process = child(target, WRITE_FOR_EVER, two_steps)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            threading.Event().wait(generator.uniform(0.02, 0.4))
        finally:
            process.kill()
            process.communicate()
        if two_steps:
            with write_bundle(target):
                pass  # puts back what was aside
        assert small.value_of(target) in (1, 10, 11)
    with write_bundle(target):
        pass
    assert small.names(target.parent) == ["emoji"]


def test_bundle_left_aside(small: Any, target: Path) -> None:
    """A writer killed between the two steps has the older bundle put back by the next, even one that then fails."""
    target.rename(target.with_name(".emoji.0123456789ab.older"))
    target.with_name(".emoji.0123456789ab.partial").mkdir()
    target.with_name(".emoji.mine.partial").mkdir()
    with pytest.raises(ZeroDivisionError), write_bundle(target):
        _ = 1 / 0
    assert small.value_of(target) == 1
    assert small.names(target.parent) == [".emoji.mine.partial", "emoji"]


@linux
@pytest.mark.heavy
@pytest.mark.parametrize("two_steps", [False, True], ids=["exchange", "two steps"])
def test_concurrent_writers(small: Any, tmp_path: Path, two_steps: bool) -> None:
    """Writers of one target at the same time all succeed, and a whole bundle and nothing else remains."""
    processes = [child(tmp_path / "emoji", WRITE_SOME, two_steps) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=300)
        assert process.returncode == 0
    assert small.value_of(tmp_path / "emoji") == 7
    assert small.names(tmp_path) == ["emoji"]


@linux
def test_no_moment_without_a_bundle(small: Any, target: Path) -> None:
    """While a bundle is replaced again and again, there always is one."""
    if writer_module._renameat2() is None:
        pytest.skip("needs renameat2")
    missing, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if not os.path.exists(target / "bundle.json"):
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for value in range(20):
            small.build(target, value)
    finally:
        done.set()
        watcher.join()
    assert not missing
