"""Bundles: written whole or not at all, and opened only if every file is the one that was written."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines.errors import BundleError, BundleIntegrityError, BundleVersionError, OutputError
from latentrt.runtime.bundle import reader as bundle_module
from latentrt.runtime.bundle import writer as writer_module
from latentrt.runtime.bundle.manifest import Component, Defaults, Graph, Latent, Manifest, Source, Tokenizer
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.bundle.writer import BundleWriter, write_bundle

FORM = "opset18-fp32"
GRAPH = Graph("unet/model.onnx", "fp32", 18, (), (), ("unet/model.onnx.data",))
MANIFEST = Manifest(
    format_version=2,
    family="sd1",
    prediction_type="epsilon",
    components={"unet": Component("unet", {FORM: GRAPH})},
    files={},
    latent=Latent(4, 8, 0.18215, 0.0),
    tokenizers={"tokenizer": Tokenizer("tokenizer", 77, 0)},
    scheduler={},
    defaults=Defaults("ddim", 20, 7.5, 64, 64, 0),
    source=Source("test", "CC0", "0"),
    tools={},
    quality={},
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def fill(writer: BundleWriter, value: int = 0, external: str = "model.onnx.data") -> None:
    """Put a small model and a tokenizer into a bundle; ``value`` tells bundles apart."""
    for name in ("unet", "tokenizer"):
        (writer.directory / name).mkdir()
    (writer.directory / "tokenizer" / "tokenizer.json").write_text("{}")
    weight = numpy_helper.from_array(np.full((4, 8), value, np.float32), "w")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.external_data_helper.set_external_data(weight := model.graph.initializer[0], external, offset=0, length=128)
    (writer.directory / GRAPH.external[0]).write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    (writer.directory / GRAPH.file).write_bytes(model.SerializeToString())


def build(target: Path, value: int = 0, extra: Callable[[BundleWriter], object] = lambda writer: None) -> Path:
    """Write a bundle, with something ``extra`` just before it is committed."""
    with write_bundle(target) as writer:
        fill(writer, value)
        extra(writer)
        writer.commit(MANIFEST)
    return target


def value_of(target: Path) -> float:
    """Open a bundle with all checks and read which one it is."""
    opened = Bundle.open(target, verify_hash=True)
    opened.graph_path("unet", FORM)
    return float(np.frombuffer(opened.file(GRAPH.external[0]).read_bytes(), np.float32)[0])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return build(tmp_path / "parent" / "emoji", 1)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- opening


def test_write_and_open(target: Path) -> None:
    """A committed bundle opens, lists all its files, and its graph opens in ONNX Runtime."""
    opened = Bundle.open(target, verify_hash=True)
    assert sorted(opened.manifest.files) == ["tokenizer/tokenizer.json", "unet/model.onnx", "unet/model.onnx.data"]
    assert opened.graph("unet", FORM) == GRAPH
    assert opened.engines_directory == target / "engines"
    assert names(target.parent) == ["emoji"]
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(opened.graph_path("unet", FORM)), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros((4, 8), np.float32)})[0], np.ones((4, 8)))


def test_same_content_same_manifest(tmp_path: Path) -> None:
    """Two bundles of the same content have the same bytes in bundle.json."""
    first, second = (build(tmp_path / name) / "bundle.json" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_open_through_a_link(target: Path) -> None:
    """The bundle itself may be reached through a symbolic link."""
    link = target.with_name("link")
    link.symlink_to(target)
    assert value_of(link) == 1
    assert Bundle.open(str(link)).path == target


def test_graph_is_guarded_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is read at the first use and not again, by however many threads."""
    calls = []
    monkeypatch.setattr(bundle_module, "check_graph", lambda root, graph: calls.append(graph))
    opened = Bundle.open(target)
    threads = [threading.Thread(target=opened.graph_path, args=("unet", FORM)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [GRAPH]


def test_unknown_names(target: Path) -> None:
    """Asking for what the bundle lacks is answered with what it has."""
    opened = Bundle.open(target)
    with pytest.raises(BundleError, match="no component 'vae'; it has unet"):
        opened.graph("vae", FORM)
    with pytest.raises(BundleError, match=f"no form 'fp8'; it has {FORM}"):
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


def test_wrong_hash(target: Path) -> None:
    """A changed file of the same size is found when hashes are asked for, the first by name of two."""
    for relative in (GRAPH.external[0], "tokenizer/tokenizer.json"):
        path = target / relative
        path.write_bytes(path.read_bytes()[::-1] if relative.endswith("json") else bytes(path.stat().st_size))
    assert Bundle.open(target)
    with pytest.raises(BundleIntegrityError, match=r"tokenizer\.json has the SHA-256"):
        Bundle.open(target, verify_hash=True)


def test_missing_and_truncated_files(target: Path) -> None:
    """A file that is missing or has another size is found without hashing."""
    path = target / GRAPH.external[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleIntegrityError, match=r"has 127 bytes, but the manifest says 128"):
        Bundle.open(target)
    path.unlink()
    with pytest.raises(BundleIntegrityError, match=r"lacks the file 'unet/model\.onnx\.data'"):
        Bundle.open(target)


def test_unlisted_files_are_tolerated(target: Path) -> None:
    """Notes and engines beside the listed files do not matter."""
    (target / "notes.txt").write_text("mine")
    (target / "engines" / "abc").mkdir(parents=True)
    (target / "engines" / "abc" / "plan").write_bytes(b"x")
    assert value_of(target) == 1


def test_graph_that_names_an_unlisted_file(tmp_path: Path) -> None:
    """An unlisted file is refused as soon as a graph names it, even though it lies in the bundle."""
    with write_bundle(tmp_path / "b") as writer:
        fill(writer, external="other.data")
        writer.commit(MANIFEST)
    (tmp_path / "b" / "unet" / "other.data").write_bytes(bytes(128))
    opened = Bundle.open(tmp_path / "b", verify_hash=True)
    with pytest.raises(BundleIntegrityError, match=r"'unet/other\.data', which the manifest does not list"):
        opened.graph_path("unet", FORM)


def test_truncated_graph(target: Path) -> None:
    """A graph that changed since the bundle was opened is refused before an SDK sees it."""
    opened = Bundle.open(target)
    path = target / GRAPH.file
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BundleIntegrityError, match="bytes, but the manifest says"):
        opened.graph_path("unet", FORM)


@pytest.mark.parametrize("relative", ["bundle.json", GRAPH.file, "tokenizer/tokenizer.json", "unet"])
def test_links_in_a_bundle(target: Path, relative: str) -> None:
    """No file or directory of a bundle may be a symbolic link, not even to the same content."""
    moved = target.with_name("moved")
    (target / relative).rename(moved)
    (target / relative).symlink_to(moved)
    with pytest.raises(BundleIntegrityError, match="symbolic link"):
        Bundle.open(target)


def test_hard_links_in_a_bundle(target: Path) -> None:
    """No file of a bundle may have a second name."""
    os.link(target / GRAPH.file, target.with_name("second"))
    with pytest.raises(BundleIntegrityError, match="hard link"):
        Bundle.open(target)


# --- writing


@pytest.fixture(params=["exchange", "two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Replace bundles in one step, and as on systems that cannot."""
    if request.param == "two steps":
        monkeypatch.setattr(writer_module, "_renameat2", lambda: None)
    elif not sys.platform.startswith("linux"):
        pytest.skip("needs renameat2")
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_replace(target: Path) -> None:
    """An older bundle is replaced as a whole, engines and notes included, and nothing is left beside it."""
    (target / "notes.txt").write_text("mine")
    build(target, 2)
    assert value_of(target) == 2
    assert names(target) == ["bundle.json", "tokenizer", "unet"]
    assert names(target.parent) == ["emoji"]


def test_replace_through_a_link(target: Path) -> None:
    """Writing to a link replaces the bundle behind it and keeps the link."""
    link = target.with_name("link")
    link.symlink_to("emoji")
    build(link, 3)
    assert link.is_symlink()
    assert value_of(target) == 3


def test_empty_directory_and_missing_parents(tmp_path: Path) -> None:
    """An empty directory is taken as a target, and missing parents are made."""
    (tmp_path / "empty").mkdir()
    assert value_of(build(tmp_path / "empty", 4)) == 4
    assert value_of(build(tmp_path / "a" / "b" / "c", 5)) == 5


def test_permissions(tmp_path: Path) -> None:
    """A bundle is as readable as any directory that this process makes."""
    (tmp_path / "plain").mkdir()
    assert build(tmp_path / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["file", "directory", "foreign manifest", "below a file"])
def test_target_of_another_kind(tmp_path: Path, kind: str) -> None:
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
    assert names(tmp_path) == ["target"]


def test_target_that_appears_meanwhile(tmp_path: Path) -> None:
    """What came to be at the target while the bundle was written is not overwritten either."""
    target = tmp_path / "b"

    def appear(writer: BundleWriter) -> None:
        target.mkdir()
        (target / "thesis.txt").write_text("precious")

    with pytest.raises(OutputError, match="left alone"):
        build(target, extra=appear)
    assert names(target) == ["thesis.txt"]
    assert names(tmp_path) == ["b"]


class Interruption(BaseException):
    """Stands for KeyboardInterrupt."""


@pytest.mark.parametrize("error", [ValueError, Interruption])
def test_exception_while_writing(target: Path, error: type[BaseException]) -> None:
    """An exception passes through unchanged, the temporary directory goes, the older bundle stays."""

    def fail(writer: BundleWriter) -> None:
        assert len(names(target.parent)) == 2
        raise error("mine")

    with pytest.raises(error, match="mine"):
        build(target, 2, fail)
    assert names(target.parent) == ["emoji"]
    assert value_of(target) == 1


def test_leaving_without_commit(target: Path) -> None:
    """Without a commit nothing happens."""
    with write_bundle(target) as writer:
        fill(writer, 9)
    assert names(target.parent) == ["emoji"]
    assert value_of(target) == 1


def test_commit_twice(tmp_path: Path) -> None:
    """A second commit is refused, and the first stands."""
    with write_bundle(tmp_path / "b") as writer:
        fill(writer, 1)
        writer.commit(MANIFEST)
        with pytest.raises(BundleError, match="committed already"):
            writer.commit(MANIFEST)
    assert value_of(tmp_path / "b") == 1


def test_commit_checks_what_it_writes(target: Path) -> None:
    """A manifest that names a missing file, a link, and a bundle.json of one's own are refused at commit."""
    with pytest.raises(BundleError, match="which files does not list"), write_bundle(target) as writer:
        writer.commit(MANIFEST)
    with pytest.raises(BundleIntegrityError, match="symbolic link"):
        build(target, 2, lambda writer: (writer.directory / "link").symlink_to("/etc/hostname"))
    with pytest.raises(BundleIntegrityError, match="hard link"):
        build(target, 2, lambda writer: os.link(writer.directory / GRAPH.file, writer.directory / "second"))
    with pytest.raises(BundleError, match="written by commit"):
        build(target, 2, lambda writer: (writer.directory / "bundle.json").write_text("{}"))
    assert value_of(target) == 1
    assert names(target.parent) == ["emoji"]


def test_engines_written_along(tmp_path: Path) -> None:
    """Engines put into a bundle before commit come along, unlisted."""
    with write_bundle(tmp_path / "b") as writer:
        fill(writer)
        (writer.directory / "engines" / "key").mkdir(parents=True)
        (writer.directory / "engines" / "key" / "engine.plan").write_bytes(b"plan")
        written = writer.commit(MANIFEST)
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


def test_errors_of_the_caller(target: Path) -> None:
    """Errors of reading elsewhere stay what they are; errors of writing the bundle are translated."""
    with pytest.raises(FileNotFoundError) as caught, write_bundle(target):
        Path("/nowhere/source").read_bytes()
    assert not isinstance(caught.value, OutputError)
    with pytest.raises(OutputError, match="could not be written") as caught, write_bundle(target) as writer:
        (writer.directory / "missing" / "file").write_bytes(b"x")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(OutputError, match="free some space"), write_bundle(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert value_of(target) == 1


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


def test_full_disk(small_disk: Path) -> None:
    """A disk that fills while files are written, or at commit, leaves the older bundle and nothing else."""
    target = build(small_disk / "b", 1)
    with pytest.raises(OutputError, match="free some space"), write_bundle(target) as writer:
        (writer.directory / "large").write_bytes(bytes(1 << 20))
    assert names(small_disk) == ["b"]

    def fill_the_disk(writer: BundleWriter) -> None:
        with suppress(OSError), (writer.directory / "rest").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))

    with pytest.raises(OutputError, match="free some space"):
        build(target, 2, fill_the_disk)
    assert names(small_disk) == ["b"]
    assert value_of(target) == 1


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
    code = CHILD.format(file=__file__, target=str(target), body=body, two_steps=two_steps)
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
def test_killed_writer(target: Path) -> None:
    """A writer killed at work leaves the older bundle; its leftover goes with the next writer, not before its end."""
    process = child(target, WRITE_HALF)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        build(target, 2)
        (leftover,) = (name for name in names(target.parent) if name != "emoji")  # it is still at work
        assert leftover.startswith(".emoji.")
        assert leftover.endswith(".partial")
    finally:
        process.kill()
        process.communicate()
    assert value_of(target) == 2
    assert names(target.parent) == [leftover, "emoji"]
    build(target, 3)
    assert names(target.parent) == ["emoji"]


@linux
@pytest.mark.heavy
@pytest.mark.parametrize("two_steps", [False, True], ids=["exchange", "two steps"])
def test_killed_at_any_moment(target: Path, two_steps: bool) -> None:
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
        assert value_of(target) in (1, 10, 11)
    with write_bundle(target):
        pass
    assert names(target.parent) == ["emoji"]


def test_bundle_left_aside(target: Path) -> None:
    """A writer killed between the two steps has the older bundle put back by the next, even one that then fails."""
    target.rename(target.with_name(".emoji.0123456789ab.older"))
    target.with_name(".emoji.0123456789ab.partial").mkdir()
    target.with_name(".emoji.mine.partial").mkdir()
    with pytest.raises(ZeroDivisionError), write_bundle(target):
        _ = 1 / 0
    assert value_of(target) == 1
    assert names(target.parent) == [".emoji.mine.partial", "emoji"]


@linux
@pytest.mark.heavy
@pytest.mark.parametrize("two_steps", [False, True], ids=["exchange", "two steps"])
def test_concurrent_writers(tmp_path: Path, two_steps: bool) -> None:
    """Writers of one target at the same time all succeed, and a whole bundle and nothing else remains."""
    processes = [child(tmp_path / "emoji", WRITE_SOME, two_steps) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=300)
        assert process.returncode == 0
    assert value_of(tmp_path / "emoji") == 7
    assert names(tmp_path) == ["emoji"]


@linux
def test_no_moment_without_a_bundle(target: Path) -> None:
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
            build(target, value)
    finally:
        done.set()
        watcher.join()
    assert not missing
