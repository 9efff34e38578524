"""Folders that take long to make and are made once: environments, converted models.

A folder is usable if it has its marker, which is written last. A folder that a killed process left has none, and the
next process removes it. The module imports only the standard library, because peers' programs use it too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MARKER = ".complete"
"""Name of the marker in a finished folder."""


def keep(
    folder: Path, make: Callable[[Path], None], sound: Callable[[Path], bool] = lambda folder: True
) -> float | None:
    """Make a folder unless it exists already; one process makes it, and others wait for it.

    Args:
        folder: The folder; its parents are made as well.
        make: Fills the folder, which is new and empty. If it raises an exception, the folder is removed.
        sound: Says whether an existing folder can still be used; if not, it is made again.

    Returns:
        Seconds of making it; ``None`` if it existed.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{folder.name}.lock"):
        if (folder / MARKER).is_file() and sound(folder):
            return None
        begin = time.perf_counter()
        if folder.exists():
            (folder / MARKER).unlink(missing_ok=True)  # first, for removal may be interrupted too
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            make(folder)
            (folder / MARKER).touch()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return time.perf_counter() - begin


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file. The file stays: if it were removed, two processes could lock two files of one name."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which unlocks, as does the end of the process
