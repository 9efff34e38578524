"""Engines in a bundle: their keys and ``records``, additions that are never half done, and damage that is found."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.errors import BundleIntegrityError, BundleVersionError, OutputError
from latentrt.engines.records import EngineRecord, engine_key, file_sha256
from latentrt.engines.store import EngineStore

DECIDES: dict[str, Any] = {
    "graph": "a" * 64,
    "weights": {"model.data": "b" * 64, "more.data": "d" * 64},
    "engine": "tensorrt-rtx",
    "sdk": "tensorrt_rtx",
    "sdk_version": "1.7.1.116",
    "precision": "fp16",
    "profile": {"x": ((1, 4, 8, 8), (1, 4, 16, 16), (2, 4, 32, 32))},
    "flags": {"tf32": False, "workspace_bytes": None},
    "target": "sm_80+",
}
KEY = engine_key(**DECIDES)
DESCRIPTION: dict[str, Any] = {
    "engine": "tensorrt-rtx",
    "component": "unet",
    "file": "unet.plan",
    "precision": "fp16",
    "profile": DECIDES["profile"],
    "sdk": "tensorrt_rtx",
    "sdk_version": "1.7.1.116",
    "target": "sm_80+",
    "flags": DECIDES["flags"],
}


def write_plan(path: Path) -> None:
    path.write_bytes(b"the plan")


def left_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.exists() else []


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def added(store: EngineStore) -> EngineRecord:
    return store.add(KEY, write_plan, **DESCRIPTION)


@pytest.mark.parametrize(
    "change",
    [
        {"graph": "c" * 64},
        {"weights": {"model.data": "c" * 64, "more.data": "d" * 64}},
        {"weights": {"model.data": "b" * 64}},
        {"engine": "tensorrt"},
        {"sdk": "tensorrt"},
        {"sdk_version": "1.7.1.117"},
        {"precision": "fp32"},
        {"profile": {"x": ((1, 4, 8, 8), (1, 4, 16, 16), (2, 4, 32, 40))}},
        {"flags": {"tf32": True, "workspace_bytes": None}},
        {"flags": {"tf32": False, "workspace_bytes": 1}},
        {"target": "sm_90"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_key_changes_with_everything_that_decides(change: dict[str, Any]) -> None:
    """Changing any one thing that decides an engine changes its key."""
    assert engine_key(**(DECIDES | change)) != KEY


def test_key_is_canonical() -> None:
    """The key is the SHA-256 of canonical JSON: neither the order of entries nor tuples in place of lists matter."""
    weights = dict(reversed(list(DECIDES["weights"].items())))
    profile = {"x": [[1, 4, 8, 8], [1, 4, 16, 16], [2, 4, 32, 32]]}
    assert engine_key(**(DECIDES | {"weights": weights, "profile": profile})) == KEY
    canonical = (
        '{"engine":"tensorrt-rtx","flags":{"tf32":false,"workspace_bytes":null},"graph":"' + "a" * 64 + '",'
        '"precision":"fp16","profile":{"x":[[1,4,8,8],[1,4,16,16],[2,4,32,32]]},"sdk":"tensorrt_rtx",'
        '"sdk_version":"1.7.1.116","target":"sm_80+",'
        '"weights":{"model.data":"' + "b" * 64 + '","more.data":"' + "d" * 64 + '"}}'
    )
    assert hashlib.sha256(canonical.encode()).hexdigest()[:24] == KEY


def test_add_then_find(store: EngineStore, added: EngineRecord) -> None:
    """What was added is found again, as it was recorded, with the plan's true size and hash."""
    assert store.find(KEY) == added
    assert store.records() == [added]
    assert store.path(added).read_bytes() == b"the plan"
    assert (added.size, added.sha256) == (8, hashlib.sha256(b"the plan").hexdigest())
    assert left_in(store.root) == [KEY]


def test_nothing_there(store: EngineStore) -> None:
    """A bundle without engines has no records, and looking does not create the directory."""
    assert store.records() == []
    assert store.find(KEY) is None
    assert not store.root.exists()


def test_records_are_sorted_and_pass_over_other_names(store: EngineStore, added: EngineRecord) -> None:
    """Records come by component, and names that are no key are passed over."""
    other = engine_key(**(DECIDES | {"target": "sm_90"}))
    text = store.add(other, write_plan, **(DESCRIPTION | {"component": "text_encoder"}))
    (store.root / ".DS_Store").write_text("")
    (store.root / f".{KEY}.0badcafe.1.0badcafe.tmp").mkdir()
    assert store.records() == [text, added]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_failed_build_leaves_nothing(store: EngineStore, error: BaseException) -> None:
    """What a build raises passes through, and not even the engines directory stays behind."""

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        store.add(KEY, fail, **DESCRIPTION)
    assert not store.root.exists()


def test_failed_build_keeps_other_engines(store: EngineStore, added: EngineRecord) -> None:
    """A failing build leaves the engines that are there as they are."""

    def fail(path: Path) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.add(engine_key(**(DECIDES | {"target": "sm_90"})), fail, **DESCRIPTION)
    assert store.records(verify_hash=True) == [added]
    assert left_in(store.root) == [KEY]


def test_full_disk_is_named(store: EngineStore) -> None:
    """An operating-system error while the plan is written becomes an OutputError that says which."""

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        store.add(KEY, fail, **DESCRIPTION)
    assert not store.root.exists()


def test_unwritable_directory_is_named(tmp_path: Path) -> None:
    """A file where the bundle should be becomes an OutputError."""
    (tmp_path / "bundle").write_text("")
    with pytest.raises(OutputError, match="cannot write an engine"):
        EngineStore(tmp_path / "bundle" / "engines").add(KEY, write_plan, **DESCRIPTION)


def test_loser_of_a_race_keeps_the_winner(store: EngineStore) -> None:
    """When the key appears while building, the engine that is there stays and is returned."""
    winner: list[EngineRecord] = []

    def slow(path: Path) -> None:
        winner.append(store.add(KEY, write_plan, **DESCRIPTION))
        path.write_bytes(b"another plan")

    assert store.add(KEY, slow, **DESCRIPTION) == winner[0]
    assert store.path(winner[0]).read_bytes() == b"the plan"
    assert left_in(store.root) == [KEY]


RACE = """
import sys, time
from pathlib import Path
from latentrt.engines.store import EngineStore
root, key, word = sys.argv[1:]
def write(path):
    path.write_text(word * 1000)
    while not (Path(root).parent / "go").exists():
        time.sleep(0.001)
fields = dict(engine="e", component="c", file="c.plan", precision="fp32", profile={})
fields |= dict(sdk="s", sdk_version="1", target="t")
store = EngineStore(Path(root))
record = store.add(key, write, **fields)
assert store.find(key) == record
print(record.sha256)
"""


def test_processes_that_race(store: EngineStore) -> None:
    """Processes that finish the same key at the same moment all end with one sound engine."""
    command = [sys.executable, "-c", RACE, str(store.root), KEY]
    processes = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(4)]
    deadline = time.monotonic() + 60
    while len(left_in(store.root)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    (store.root.parent / "go").touch()
    printed = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    (record,) = store.records(verify_hash=True)
    assert printed == {record.sha256}
    assert left_in(store.root) == [KEY]


KILLED = """
import os, signal, sys
from pathlib import Path
from latentrt.engines.store import EngineStore
fields = dict(engine="e", component="c", file="c.plan", precision="fp32", profile={})
fields |= dict(sdk="s", sdk_version="1", target="t")
def write(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
EngineStore(Path(sys.argv[1])).add(sys.argv[2], write, **fields)
"""


def test_killed_build_is_cleaned_up_by_the_next(store: EngineStore) -> None:
    """A killed build leaves a temporary directory that nothing lists and the next add removes."""
    subprocess.run([sys.executable, "-c", KILLED, str(store.root), KEY], check=False, timeout=60)
    (left,) = left_in(store.root)
    assert left.endswith(".tmp")
    assert store.find(KEY) is None
    assert store.records() == []
    store.add(KEY, write_plan, **DESCRIPTION)
    assert left_in(store.root) == [KEY]


def test_running_builds_are_left_alone(store: EngineStore) -> None:
    """Temporary directories of a running process or a foreign machine stay, until they are a day old."""
    import latentrt.engines.store as module

    store.root.mkdir()
    ours, foreign, old = (
        store.root / f".{KEY}.{host}.{os.getpid()}.0000000{i}.tmp"
        for i, host in enumerate([module._host(), "ffffffff", "ffffffff"])
    )
    for directory in (ours, foreign, old):
        directory.mkdir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    store.add(KEY, write_plan, **DESCRIPTION)
    assert left_in(store.root) == sorted([ours.name, foreign.name, KEY])


def _edit(store: EngineStore, **changes: Any) -> None:
    path = store.root / KEY / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _link_plan(store: EngineStore, link: Any) -> None:
    plan = store.root / KEY / "unet.plan"
    plan.rename(store.root.parent / "outside")
    link(store.root.parent / "outside", plan)


DAMAGE: dict[str, Any] = {
    "plan missing": lambda store: (store.root / KEY / "unet.plan").unlink(),
    "plan truncated": lambda store: (store.root / KEY / "unet.plan").write_bytes(b"the"),
    "plan changed": lambda store: (store.root / KEY / "unet.plan").write_bytes(b"THE PLAN"),
    "plan is a symbolic link": lambda store: _link_plan(store, os.symlink),
    "plan is a hard link": lambda store: _link_plan(store, os.link),
    "record missing": lambda store: (store.root / KEY / "engine.json").unlink(),
    "record truncated": lambda store: (store.root / KEY / "engine.json").write_text('{"format_version": 1,'),
    "record of another type": lambda store: (store.root / KEY / "engine.json").write_text("[]"),
    "record not text": lambda store: (store.root / KEY / "engine.json").write_bytes(b"\xff\xfe\x00"),
    "record nested too deep": lambda store: (store.root / KEY / "engine.json").write_text("[" * 100_000),
    "record too large": lambda store: (store.root / KEY / "engine.json").write_text(" " * (1 << 20) + "{}"),
    "another key": lambda store: _edit(store, key="0" * 24),
    "unknown field": lambda store: _edit(store, command="x"),
    "wrong type": lambda store: _edit(store, size="8"),
    "file outside": lambda store: _edit(store, file="../../outside"),
    "absolute file": lambda store: _edit(store, file="/etc/passwd"),
    "record as file": lambda store: _edit(store, file="engine.json"),
    "flags that are a list": lambda store: _edit(store, flags=["tf32"]),
    "profile with floats": lambda store: _edit(store, profile={"x": [[1.5], [2], [3]]}),
    "profile with two shapes": lambda store: _edit(store, profile={"x": [[1], [2]]}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_repaired(store: EngineStore, added: EngineRecord, damage: Any) -> None:
    """Any damage raises an error that names the engine; with repair=True the engine is removed instead."""
    damage(store)
    with pytest.raises(BundleIntegrityError, match=KEY):
        store.find(KEY)
    with pytest.raises(BundleIntegrityError, match=KEY):
        store.records(verify_hash=True)
    assert store.find(KEY, repair=True) is None
    assert left_in(store.root) == []
    assert store.add(KEY, write_plan, **DESCRIPTION).sha256 == added.sha256


def test_sound_engine_survives_repair(store: EngineStore, added: EngineRecord) -> None:
    """repair=True leaves an engine that is not damaged."""
    assert store.find(KEY, repair=True) == added


def test_discard_removes_a_sound_engine(store: EngineStore, added: EngineRecord) -> None:
    """What an SDK refuses makes room for another, and discarding it again is no error."""
    for _ in range(2):
        store.discard(KEY)
        assert store.find(KEY) is None
    assert left_in(store.root) == []
    assert store.add(KEY, write_plan, **DESCRIPTION).sha256 == added.sha256


def test_engine_repaired_meanwhile_survives(store: EngineStore, added: EngineRecord) -> None:
    """If another process replaced the damaged engine before it could be removed, the new one stays."""
    assert store._remove_damaged(KEY, True) == added
    assert left_in(store.root) == [KEY]


def test_unreadable_engine(store: EngineStore, added: EngineRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operating-system error while an engine is read names the engine and the error."""

    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("latentrt.engines.records.file_sha256", fail)
    with pytest.raises(BundleIntegrityError, match=rf"{KEY} is damaged: it cannot be read \(Input/output error\)"):
        store.find(KEY)


def test_other_format_version(store: EngineStore, added: EngineRecord) -> None:
    """A record of another format version is named as such, and rebuilt under repair=True."""
    _edit(store, format_version=3)
    with pytest.raises(BundleVersionError, match="format version 3"):
        store.find(KEY)
    assert store.find(KEY, repair=True) is None


def test_links_in_place_of_directories(store: EngineStore, added: EngineRecord, tmp_path: Path) -> None:
    """Neither an engine's directory nor the engines directory may be a symbolic link."""
    (store.root / KEY).rename(tmp_path / "elsewhere")
    (store.root / KEY).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="not a directory"):
        store.find(KEY)
    assert store.find(KEY, repair=True) is None
    assert (tmp_path / "elsewhere" / "unet.plan").exists(), "the link is removed, not what it points to"
    (tmp_path / "link").symlink_to(store.root)
    with pytest.raises(BundleIntegrityError, match="not a directory"):
        EngineStore(tmp_path / "link").records()


@pytest.mark.parametrize("key", ["", "../x", "A" * 24, "0" * 23])
def test_keys_are_checked(store: EngineStore, key: str) -> None:
    """What is no key cannot become a path."""
    with pytest.raises(ValueError, match="24 hex digits"):
        store.find(key)


@pytest.mark.parametrize("name", ["../x.plan", "a/b", "", "engine.json", ".hidden"])
def test_file_names_are_checked(store: EngineStore, name: str) -> None:
    """What is no plain name cannot become a file of an engine."""
    with pytest.raises(ValueError, match="plain file name"):
        store.add(KEY, write_plan, **(DESCRIPTION | {"file": name}))
    assert not store.root.exists()


def test_path_checks_again(store: EngineStore, added: EngineRecord) -> None:
    """Asking for the plan's path fails once the plan is not the recorded one."""
    (store.root / KEY / "unet.plan").write_bytes(b"longer than it was")
    with pytest.raises(BundleIntegrityError, match="18 bytes"):
        store.path(added)


def test_file_sha256(tmp_path: Path) -> None:
    """Hashing in blocks equals hashing at once, beyond one block too."""
    data = os.urandom((1 << 20) + 5)
    (tmp_path / "f").write_bytes(data)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()
