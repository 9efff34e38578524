"""Files that a request names: regular, bounded, and the same as they were."""

from __future__ import annotations

import hashlib
import os
import stat

from latentrt.engines.errors import InvalidRequestError

MOST_BYTES = 2**30
"""Largest file that is hashed."""


def read_bounded(path: str | os.PathLike[str], label: str, most: int) -> bytes:
    """A file's content.

    Args:
        path: The file.
        label: What messages call it.
        most: Largest file in bytes.

    Raises:
        InvalidRequestError: if it is missing, no regular file, or too large.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidRequestError(f"{label} is no regular file")
            if status.st_size > most:
                raise InvalidRequestError(f"{label} has {status.st_size:,} bytes, expected at most {most:,}")
            return file.read(most)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"{label} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file, but wait for nobody to write into a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def require_same(path: str, sha256: str, label: str) -> None:
    """Refuse a file that is not what it was.

    Raises:
        InvalidRequestError: if its hash is another, or it cannot be read.
    """
    if hashlib.sha256(read_bounded(path, label, MOST_BYTES)).hexdigest() != sha256.lower():
        raise InvalidRequestError(f"{label} is not the file that was used, its SHA-256 differs; give the file itself")
