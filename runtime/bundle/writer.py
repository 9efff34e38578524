"""Writing a bundle so that a crash never leaves half of one."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from latentrt.engines.errors import BundleError, BundleIntegrityError, LatentRTError, OutputError

from .manifest import ENGINES_DIRECTORY, MANIFEST_FILE, MAX_JSON_BYTES, FileEntry, Manifest
from .manifest_reading import read_manifest
from .paths import plain_file
from .reader import Bundle, sha256_of

_PARTIAL = ".partial"  # a bundle being written, or the leftover of a killed writer
_OLDER = ".older"  # the older bundle while it is being replaced in two steps


class BundleWriter:
    """A bundle being written; made by :func:`write_bundle`.

    Attributes:
        target: Path that the bundle will have.
        directory: Directory of its files until then.
    """

    def __init__(self, target: Path, directory: Path, claim: int | None) -> None:
        self.target = target
        self.directory = directory
        self.committed = False
        self._claim = claim

    def preview(self, manifest: Manifest) -> Bundle:
        """A bundle of the files so far, to be run before it is committed; nothing is hashed or written.

        Args:
            manifest: Everything but :attr:`Manifest.files`, which is filled in here with sizes alone.
        """
        files = {
            path.relative_to(self.directory).as_posix(): FileEntry(path.stat().st_size, "")
            for path in self.directory.rglob("*")
            if path.is_file()
        }
        return Bundle(self.directory, replace(manifest, files=files))

    def commit(self, manifest: Manifest) -> Manifest:
        """Hash all files, write ``bundle.json``, and put the bundle in its place.

        Files under ``engines/`` come along unlisted; engines have records of their own.

        Args:
            manifest: Everything but :attr:`Manifest.files`, which is filled in here.

        Returns:
            The manifest as written.

        Raises:
            BundleError: if the manifest or a file is not one that :meth:`Bundle.open` would take.
            OutputError: if the disk or the target does not let it be written; an older bundle is unchanged.
        """
        if self.committed:
            raise BundleError(f"{self.target} was committed already; write a bundle anew with write_bundle")
        with _as_output_error(self.target):
            complete = replace(manifest, files=self._collect())
            text = complete.to_json()
            complete = read_manifest(text, origin="the manifest to write")
            with (self.directory / MANIFEST_FILE).open("xb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            for parent, _, _ in os.walk(self.directory, topdown=False):
                _sync(Path(parent))
            _place(self.directory, self.target)
            self.committed = True
            self._release()
            _sync(self.target.parent)
        return complete

    def _release(self) -> None:
        """Give up the claim on the directory; a second call does nothing."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _collect(self) -> dict[str, FileEntry]:
        """Entries of all files, which are on the disk afterwards."""
        entries = {}
        for parent, directories, names in os.walk(self.directory, onerror=_reraise):
            directories.sort()
            for name in sorted(directories + names):
                path = Path(parent, name)
                relative = path.relative_to(self.directory).as_posix()
                status = path.lstat()
                if stat.S_ISDIR(status.st_mode):
                    continue
                if relative == MANIFEST_FILE:
                    raise BundleError(f"{path} exists already; {MANIFEST_FILE} is written by commit")
                plain_file(self.directory, relative)
                _sync(path)
                if not relative.startswith(f"{ENGINES_DIRECTORY}/"):
                    entries[relative] = FileEntry(status.st_size, sha256_of(path))
        return entries


@contextmanager
def write_bundle(target: str | os.PathLike[str]) -> Iterator[BundleWriter]:
    """Write a bundle beside its target, then put it there in one step.

    ``target`` may be absent, an empty directory, or an older bundle, which is then replaced as a whole and takes
    nothing over (neither compiled engines nor notes). Where the system can exchange two directories (Linux), there
    is no moment without a complete bundle at ``target``; elsewhere the older one is put aside for a moment, and put
    back by the next writer should this one be killed just then. Until :meth:`BundleWriter.commit` nothing at
    ``target`` changes, and if it is never reached, be it by an exception or by a plain return, all that was
    written is removed. Of writers at the same time the last to commit wins.

    A process that keeps an older bundle open keeps the files that it has open; later ones it takes from the
    new bundle, where another size is noticed. Open the bundle again after a rebuild.

    Example:
        >>> with write_bundle("build/emoji") as writer:                               # doctest: +SKIP
        ...     (writer.directory / "unet").mkdir()
        ...     export_to(writer.directory / "unet" / "model.onnx")
        ...     writer.commit(manifest)

    Raises:
        OutputError: if ``target`` is something else, or cannot be written.
    """
    place = Path(target)
    with _as_output_error(place):
        place = Path(os.path.realpath(place))  # a link to a bundle stays a link, to the new bundle
        _check_target(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(place)
        writer = BundleWriter(place, *_make_partial(place))
    try:
        with _as_output_error(place, writer.directory):
            yield writer
    finally:
        # Once committed, this is the older bundle, if there was one.
        shutil.rmtree(writer.directory, ignore_errors=True)
        writer._release()


@contextmanager
def _as_output_error(target: Path, directory: Path | None = None) -> Iterator[None]:
    """Translate the system's refusals; with ``directory`` only those that come from writing below it."""
    try:
        yield
    except LatentRTError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        names = [
            Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))
        ]
        if directory is not None and not full and not any(directory in (name, *name.parents) for name in names):
            raise
        way_out = "free some space" if full else "choose another place or its permissions"
        raise OutputError(
            f"the bundle {target} could not be written ({error.strerror or error}); {way_out} and run again"
        ) from error
    except ValueError as error:
        if directory is not None:
            raise
        raise OutputError(f"{str(target)!r} is not a path that can be written: {error}") from error


def _check_target(target: Path) -> None:
    """Refuse to replace anything but a bundle or an empty directory."""
    while True:
        try:
            seen = target.stat()
            if not any(target.iterdir()):
                return
        except FileNotFoundError:
            return
        except NotADirectoryError as error:
            raise OutputError(f"{target} is a file, or below one, and is left alone; choose another place") from error
        if _is_bundle(target):
            return
        # Where directories cannot be exchanged, another writer may have put the bundle aside just now: look again.
        with suppress(FileNotFoundError):
            if os.path.samestat(seen, target.stat()):
                raise OutputError(
                    f"{target} is a directory with other content than a bundle and is left alone; "
                    "choose another, or empty it"
                )


def _is_bundle(directory: Path) -> bool:
    """Whether there is a manifest, of whatever format version, so that the directory is ours to replace."""
    try:
        plain_file(directory, MANIFEST_FILE)
        with (directory / MANIFEST_FILE).open("rb") as file:
            record = json.loads(file.read(MAX_JSON_BYTES + 1))
    except (BundleIntegrityError, FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "format_version" in record and "components" in record


def _make_partial(target: Path) -> tuple[Path, int | None]:
    """Make a directory beside the target and claim it, so that no other writer takes it for a leftover."""
    while True:
        directory = target.with_name(f".{target.name}.{secrets.token_hex(6)}{_PARTIAL}")
        directory.mkdir()
        claim = _claim(directory, wait=True)
        # In the moment before the claim another writer may have cleaned the directory up.
        if directory.is_dir():
            return directory, claim
        if claim is not None:
            os.close(claim)


def _claim(directory: Path, *, wait: bool) -> int | None:
    """Lock a directory until the returned handle is closed or this process ends, however it ends.

    Returns:
        None if the directory is gone, or if there are no such locks on this system or file system.

    Raises:
        BlockingIOError: if another process has it and ``wait`` is false.
    """
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(handle)
        if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            return None
        raise
    return handle


def _clean_up(target: Path) -> None:
    """Remove leftovers of killed writers beside the target, and put back an older bundle that one had put aside."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}(?:{re.escape(_PARTIAL)}|{re.escape(_OLDER)})")
    for leftover in sorted(target.parent.iterdir()):
        if not ours.fullmatch(leftover.name) or leftover.is_symlink():
            continue
        with suppress(OSError):  # its writer is at work, or it is another user's
            claim = _claim(leftover, wait=False)
            if claim is None:
                continue  # without a lock nobody knows whether its writer is at work
            try:
                if leftover.suffix == _OLDER and not os.path.lexists(target):
                    leftover.rename(target)
                else:
                    shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(claim)


def _place(directory: Path, target: Path) -> None:
    """Rename ``directory`` to ``target``; an older bundle is then at ``directory``, or gone."""
    while True:
        try:
            directory.rename(target)  # works if there is nothing, or an empty directory
            return
        except OSError as error:
            occupied = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not occupied and not (error.errno == errno.EACCES and target.is_dir()):  # Windows says EACCES
                raise
        _check_target(target)  # what is there now may be newer than the first look
        # A target that is not found was taken away by another writer at this moment: look again.
        with suppress(FileNotFoundError):
            if _exchange(directory, target) or _replace_in_two_steps(directory, target):
                return


def _replace_in_two_steps(directory: Path, target: Path) -> bool:
    """Put the older bundle aside, the new one in its place, and remove the older.

    Returns:
        False if another writer replaced the target meanwhile.
    """
    claim = _claim(target, wait=True)
    try:
        if claim is not None and not os.path.samestat(os.fstat(claim), target.stat()):
            return False
        aside = directory.with_suffix(_OLDER)
        target.rename(aside)
        try:
            directory.rename(target)
            done = True
        except BaseException as error:
            # In the gap another writer may have put its bundle there; what is aside is then out of date.
            if not isinstance(error, OSError) or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                aside.rename(target)
                raise
            done = False
        shutil.rmtree(aside, ignore_errors=True)
        return done
    finally:
        if claim is not None:
            os.close(claim)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two directories in one step (renameat2(2), RENAME_EXCHANGE).

    Returns:
        Whether the system and the file system can do that.
    """
    function = _renameat2()
    if function is None:
        return False
    at_current, exchange = -100, 2
    if function(at_current, os.fsencode(first), at_current, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(second))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def _sync(path: Path) -> None:
    """Put a file's content, or a directory's entries, on the disk, so that they outlive a power cut."""
    if sys.platform == "win32":
        return  # directories cannot be opened there, and files only for writing
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reraise(error: OSError) -> None:
    raise error
