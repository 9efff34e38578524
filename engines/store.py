"""Compiled engines of a bundle: ``engines/<key>/``, one directory for each engine, found by what decides it.

A directory holds the compiled file (the plan) and ``engine.json``, its record. It appears under its key in one
rename, complete, and neither is changed afterwards (a session may put a cache of its own beside them); so readers need
no lock, and of two processes that build the same key one wins and the other uses the winner's. An engine built from
anything else has another key, so a stale engine is not found rather than reused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .errors import BundleIntegrityError, BundleVersionError, LatentRTError, OutputError

FORMAT_VERSION = 2
"""Version of ``engine.json`` that this module writes and reads."""

RECORD_NAME = "engine.json"

Shapes: TypeAlias = Mapping[str, Sequence[Sequence[int]]]
"""An optimisation profile: input name -> (minimum, optimum, maximum) shape."""

_KEY = re.compile(r"[0-9a-f]{24}")
_TEMPORARY = re.compile(r"\.(?P<key>[0-9a-f]{24})\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
_STALE_SECONDS = 24 * 3600
_MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class EngineRecord:
    """What ``engine.json`` says about a compiled engine.

    Attributes:
        key: What :func:`engine_key` returned for it, and the name of its directory.
        engine: Name of the engine, e.g. ``"tensorrt-rtx"``.
        component: Part of the model that it computes, e.g. ``"unet"``.
        file: Plain name of the compiled file, inside the directory.
        size: Length of that file in bytes.
        sha256: Its SHA-256, in hex.
        precision: ``"fp32"``, ``"fp16"``, ...
        profile: Input name -> (minimum, optimum, maximum) shape, for the inputs with dynamic shapes.
        flags: Builder options by name, as they went into the key; None where the builder's defaults were used.
        sdk: Name of the SDK that compiled it.
        sdk_version: Version of that SDK.
        target: What it runs on: ``"sm_90"``, ``"sm_80+"``, a CPU instruction set.
        built_seconds: How long compiling took.
        created: When, in UTC, ISO 8601.
    """

    key: str
    engine: str
    component: str
    file: str
    size: int
    sha256: str
    precision: str
    profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    flags: Mapping[str, Any] | None
    sdk: str
    sdk_version: str
    target: str
    built_seconds: float
    created: str


def engine_key(
    *,
    graph: str,
    weights: Mapping[str, str],
    engine: str,
    sdk: str,
    sdk_version: str,
    precision: str,
    profile: Shapes,
    flags: Mapping[str, Any],
    target: str,
) -> str:
    """Name an engine by all that decides it; change any of it and the key is another.

    Args:
        graph: SHA-256 (hex) of the ONNX graph file.
        weights: Name -> SHA-256 (hex) of every external weights file that the graph uses.
        engine: Name of the engine, e.g. ``"tensorrt-rtx"``.
        sdk: Name of the SDK.
        sdk_version: Version of the SDK, in full.
        precision: ``"fp32"``, ``"fp16"``, ...
        profile: Input name -> (minimum, optimum, maximum) shape.
        flags: Builder options by name, JSON values.
        target: GPU architecture or compute-capability target, or CPU instruction set.

    Returns:
        The first 24 hex digits (96 bits) of the SHA-256 of all this in canonical JSON.
    """
    decides = {
        "graph": graph,
        "weights": dict(weights),
        "engine": engine,
        "sdk": sdk,
        "sdk_version": sdk_version,
        "precision": precision,
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in profile.items()},
        "flags": dict(flags),
        "target": target,
    }
    canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class EngineStore:
    """The ``engines/`` directory of a bundle. Constructing one touches nothing.

    Args:
        root: The directory; it need not exist before the first :meth:`add`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def stored_keys(self) -> list[str]:
        """Keys of all engines, sound or not. Names that are no key (temporary ones too) are passed over.

        Raises:
            BundleIntegrityError: if something else is in the directory's place.
        """
        return sorted(filter(_KEY.fullmatch, os.listdir(self.root))) if self._has_root() else []

    def records(self, *, verify_hash: bool = False) -> list[EngineRecord]:
        """All engines, by component, then engine, then key.

        Raises:
            BundleIntegrityError: naming the engine that is damaged.
            BundleVersionError: if an engine's record is of another format version.
        """
        records = [
            record for key in self.stored_keys() if (record := self.find(key, verify_hash=verify_hash)) is not None
        ]
        return sorted(records, key=lambda record: (record.component, record.engine, record.key))

    def find(self, key: str, *, repair: bool = False, verify_hash: bool = True) -> EngineRecord | None:
        """Look an engine up.

        Args:
            key: What :func:`engine_key` returned.
            repair: Remove an engine that is damaged or of another format version, and return None for it, so that
                it is built anew.
            verify_hash: Read the whole compiled file and compare its SHA-256, besides its size.

        Returns:
            Its record, or None if there is none.

        Raises:
            BundleIntegrityError: naming the damage: record or file missing, unreadable, of another size or hash,
                or not a regular file.
            BundleVersionError: if the record is of another format version.
        """
        _check_key(key)
        if not self._has_root() or not os.path.lexists(self.root / key):
            return None
        try:
            return _read_directory(self.root / key, key, verify_hash)
        except (BundleIntegrityError, BundleVersionError):
            if not repair:
                raise
        return self._remove_damaged(key, verify_hash)

    def path(self, record: EngineRecord) -> Path:
        """The compiled file of an engine, once more checked to be a regular file of the recorded size.

        Raises:
            BundleIntegrityError: if it is not.
        """
        _check_key(record.key)
        _check_file(self.root / record.key, record)
        return self.root / record.key / record.file

    def add(
        self,
        key: str,
        write: Callable[[Path], None],
        *,
        engine: str,
        component: str,
        file: str,
        precision: str,
        profile: Shapes,
        sdk: str,
        sdk_version: str,
        target: str,
        flags: Mapping[str, Any] | None = None,
    ) -> EngineRecord:
        """Compile an engine and keep it.

        Whatever ``write`` raises passes through, KeyboardInterrupt too, and nothing is left behind; what a killed
        process left behind is removed by the next call on the same machine.

        Args:
            key: What :func:`engine_key` returned.
            write: Compiles the engine to the path it is given. It is timed.
            engine: As in :class:`EngineRecord`; so are the other arguments.

        Returns:
            The record of the engine now under ``key``: if another process was faster, that one's.

        Raises:
            OutputError: if the directory cannot be written.
            BundleIntegrityError: if another engine stands under ``key`` and is damaged.
        """
        _check_key(key)
        if not _PLAIN_NAME.fullmatch(file) or file == RECORD_NAME:
            raise ValueError(f"{file!r} cannot name an engine's file; expected a plain file name such as 'unet.plan'")
        with self._writing():
            created_root = not self._has_root()
            self.root.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            temporary = self.root / f".{key}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
            temporary.mkdir()
        try:
            with self._writing():
                started = time.perf_counter()
                write(temporary / file)
                seconds = time.perf_counter() - started
                record = EngineRecord(
                    key=key,
                    engine=engine,
                    component=component,
                    file=file,
                    size=(temporary / file).stat().st_size,
                    sha256=file_sha256(temporary / file),
                    precision=precision,
                    profile=_profile({name: [list(shape) for shape in shapes] for name, shapes in profile.items()}),
                    flags=None if flags is None else dict(flags),
                    sdk=sdk,
                    sdk_version=sdk_version,
                    target=target,
                    built_seconds=round(seconds, 3),
                    created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                )
                text = json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(record)}, indent=2)
                (temporary / RECORD_NAME).write_text(text + "\n", encoding="utf-8")
                for path in (temporary / file, temporary / RECORD_NAME, temporary):
                    _fsync(path)
                try:
                    os.rename(temporary, self.root / key)
                except OSError:
                    # The loser of a race: a directory that is not empty is in the way, and it stays.
                    if (winner := self.find(key)) is None:
                        raise
                    return winner
                _fsync(self.root)
                return record
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if created_root:
                with contextlib.suppress(OSError):
                    self.root.rmdir()  # succeeds only while it is empty: nothing came of this

    def discard(self, key: str) -> None:
        """Remove an engine that its SDK refuses, so that it is built anew; none under ``key`` is no error.

        Raises:
            OutputError: if it cannot be removed.
        """
        _check_key(key)
        aside = self.root / f".{key}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        with self._writing(), contextlib.suppress(FileNotFoundError):
            os.rename(self.root / key, aside)
            _remove(aside)

    def _has_root(self) -> bool:
        try:
            mode = os.lstat(self.root).st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(mode):
            raise BundleIntegrityError(f"{self.root} is not a directory; a bundle's engines must be in one, not a link")
        return True

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except LatentRTError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write an engine to {self.root}: {error.strerror or error}") from error

    def _remove_stale(self) -> None:
        """Remove what builds that were killed left behind; a build that may still run is left alone."""
        for name in os.listdir(self.root):
            if not (match := _TEMPORARY.fullmatch(name)):
                continue
            directory = self.root / name
            with contextlib.suppress(FileNotFoundError):  # another process may be cleaning up too
                old = time.time() - os.lstat(directory).st_mtime > _STALE_SECONDS
                if old or (match["host"] == _host() and not _is_running(int(match["pid"]))):
                    _remove(directory)

    def _remove_damaged(self, key: str, verify_hash: bool) -> EngineRecord | None:
        aside = self.root / f".{key}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        with self._writing():
            try:
                os.rename(self.root / key, aside)
            except FileNotFoundError:
                return None
            try:
                # Another process may have repaired it since it was read: then it goes back.
                record = _read_directory(aside, key, verify_hash)
            except (BundleIntegrityError, BundleVersionError):
                _remove(aside)
                return None
            try:
                os.rename(aside, self.root / key)
            except OSError:
                _remove(aside)
                return self.find(key, verify_hash=verify_hash)
            return record


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not the key of an engine; expected 24 hex digits, as engine_key returns")


def _read_directory(directory: Path, key: str, verify_hash: bool) -> EngineRecord:
    if not stat.S_ISDIR(os.lstat(directory).st_mode):
        raise BundleIntegrityError(f"engine {key} is not a directory; delete {directory} and build it again")
    try:
        record = _read_record(directory, key)
        _check_file(directory, record)
        if verify_hash and file_sha256(directory / record.file) != record.sha256:
            raise _damaged(directory, f"the SHA-256 of {record.file} is not the recorded one")
    except OSError as error:
        raise _damaged(directory, f"it cannot be read ({error.strerror or error})") from error
    return record


def _damaged(directory: Path, what: str) -> BundleIntegrityError:
    return BundleIntegrityError(f"engine {directory.name} is damaged: {what}; delete {directory} and build it again")


def _regular_size(directory: Path, name: str) -> int:
    try:
        status = os.lstat(directory / name)
    except FileNotFoundError:
        raise _damaged(directory, f"{name} is missing") from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise _damaged(directory, f"{name} is a link or no regular file")
    return status.st_size


def _check_file(directory: Path, record: EngineRecord) -> None:
    size = _regular_size(directory, record.file)
    if size != record.size:
        raise _damaged(directory, f"{record.file} has {size} bytes, its record says {record.size}")


def _read_record(directory: Path, key: str) -> EngineRecord:
    if _regular_size(directory, RECORD_NAME) > _MAX_RECORD_BYTES:
        raise _damaged(directory, f"{RECORD_NAME} is larger than {_MAX_RECORD_BYTES} bytes")
    try:
        data = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
        version = data.pop("format_version")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(directory, f"{RECORD_NAME} is no engine record ({type(error).__name__})") from error
    if version != FORMAT_VERSION:
        raise BundleVersionError(
            f"engine {key} has a record of format version {version!r}, this version of LatentRT reads "
            f"{FORMAT_VERSION}; delete {directory} and build it again"
        )
    kinds: dict[str, tuple[type, ...]] = {field.name: (str,) for field in dataclasses.fields(EngineRecord)}
    kinds |= {"size": (int,), "built_seconds": (int, float), "profile": (dict,)}
    kinds["flags"] = (dict, type(None))
    if wrong := sorted(data.keys() ^ kinds.keys()):
        raise _damaged(directory, f"{RECORD_NAME} lacks or adds {wrong[0]!r}")
    if wrong := [name for name, kind in kinds.items() if not isinstance(data[name], kind)]:
        raise _damaged(directory, f"{RECORD_NAME} has {wrong[0]} = {data[wrong[0]]!r:.40}")
    if data["key"] != key:
        raise _damaged(directory, f"its record is of engine {data['key']!r:.40}")
    if not _PLAIN_NAME.fullmatch(data["file"]) or data["file"] == RECORD_NAME:
        raise _damaged(directory, f"its record names the file {data['file']!r:.80}, which is no plain file name")
    try:
        data["profile"] = _profile(data["profile"])
    except (TypeError, ValueError) as error:
        raise _damaged(directory, f"{RECORD_NAME} has a profile that is none") from error
    return EngineRecord(**data)


def _profile(shapes: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Raises ValueError or TypeError unless every entry is three lists of integers."""
    result = {}
    for name, entry in shapes.items():
        smallest, usual, largest = entry
        triple = (tuple(smallest), tuple(usual), tuple(largest))
        if not all(type(length) is int for shape in triple for length in shape):
            raise ValueError(name)
        result[name] = triple
    return result


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill(pid, 0) is no mere question on Windows; there only age tells
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a directory, or a link or file that stands in its place, without following it."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
