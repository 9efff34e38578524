"""Compiled engines of a bundle: ``engines/<key>/``, one directory for each, named by all that decides it.

A directory holds the compiled file (the plan) and ``engine.json``, its record. It appears under its key in one
rename, complete, and neither file is changed afterwards (a session may put a cache of its own beside them). So readers
need no lock, and of two processes that build the same key one wins and the other uses the winner's. An engine built
from anything else has another key, so a stale engine is not found rather than reused.
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import BundleIntegrityError, BundleVersionError, LatentRTError, OutputError
from .records import (
    FORMAT_VERSION,
    PLAIN_NAME,
    RECORD_NAME,
    EngineRecord,
    Shapes,
    as_profile,
    check_file,
    file_sha256,
    read_engine,
)

_KEY = re.compile(r"[0-9a-f]{24}")
_TEMPORARY = re.compile(r"\.(?P<key>[0-9a-f]{24})\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_STALE_SECONDS = 24 * 3600


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
            key: From :func:`~latentrt.engines.records.engine_key`.
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
            return read_engine(self.root / key, key, verify_hash)
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
        check_file(self.root / record.key, record)
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

        Whatever ``write`` raises passes through, KeyboardInterrupt too, and nothing is left behind. The next
        call on the same machine removes the leftovers of a killed process.

        Args:
            key: From :func:`~latentrt.engines.records.engine_key`.
            write: Compiles the engine to a path. It is timed.
            engine: As in :class:`~latentrt.engines.records.EngineRecord`; so are the other arguments.

        Returns:
            The record of the engine now under ``key``: if another process was faster, that one's.

        Raises:
            OutputError: if the directory cannot be written.
            BundleIntegrityError: if another engine stands under ``key`` and is damaged.
        """
        _check_key(key)
        if not PLAIN_NAME.fullmatch(file) or file == RECORD_NAME:
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
                    profile=as_profile({name: [list(shape) for shape in shapes] for name, shapes in profile.items()}),
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
        """Remove leftovers of builds that were killed; a build that may still run is left alone."""
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
                record = read_engine(aside, key, verify_hash)
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


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill(pid, 0) is no mere question on Windows; there only its age counts
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
