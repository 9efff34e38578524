"""Folders that take long to make and are made once: environments, converted models.

A folder is usable when its marker is there, which is written last. What a killed maker left has none, and the next one
removes it. Standard library only: peers' programs use it too.
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


def keep(
    folder: Path, make: Callable[[Path], None], sound: Callable[[Path], bool] = lambda folder: True
) -> float | None:
    """Make a folder unless it is there already; one process at a time, others wait and find it made.

    Args:
        folder: Which; its parents are made as well.
        make: Fills it; it is new and empty. Whatever this raises is passed on, and the folder is gone again.
        sound: Whether what was kept can still be used, else it is made anew.

    Returns:
        Seconds that making took, None if it was there.

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
    """Hold the lock of a file, which stays: removing it would let two processes lock two files of one name."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which unlocks, as does the end of the process
