"""Files that a request names: regular, of bounded size, and unchanged."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import InvalidRequestError

MOST_BYTES = 2**30
"""Largest file that is hashed, in bytes."""


def read_bounded(path: str | os.PathLike[str], label: str, most: int) -> bytes:
    """Read a file of bounded size.

    Args:
        path: The file.
        label: Its name in messages.
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
    """Open a file; a pipe is opened at once, without waiting for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def require_same(path: str, sha256: str, label: str) -> None:
    """Refuse a file that has changed.

    Args:
        path: The file.
        sha256: SHA-256 that it had, in hexadecimal digits of either case.
        label: Its name in messages.

    Raises:
        InvalidRequestError: if its hash differs, or it cannot be read.
    """
    if hashlib.sha256(read_bounded(path, label, MOST_BYTES)).hexdigest() != sha256.lower():
        raise InvalidRequestError(f"{label} is not the file that was used, its SHA-256 differs; give the file itself")


_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file.

    Attributes:
        name: Its name.
        kind: Its element type, by the format's name for it, such as ``F16``.
        shape: Its dimensions.
        data: Its elements in row-major order, little-endian.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: bytes

    def floats(self) -> NDArray[np.float32] | None:
        """Its values as float32, those out of range as infinity; ``None`` unless the type is F64, F32, F16 or BF16."""
        if self.kind == "BF16":  # the upper half of fp32
            values = (np.frombuffer(self.data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif self.kind in _TYPES:
            with np.errstate(over="ignore"):
                values = np.frombuffer(self.data, _TYPES[self.kind]).astype(np.float32)
        else:
            return None
        return values.reshape(self.shape)


def stored_tensors(content: bytes) -> list[StoredTensor]:
    """Tensors of a safetensors file; the safetensors library checks names, types and places.

    Args:
        content: The whole file.

    Raises:
        ValueError: naming the fault of the file in one line.
    """
    import safetensors  # here, since most pipelines need no such file

    try:
        found: list[tuple[str, Mapping[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ValueError((str(error).strip().splitlines() or [type(error).__name__])[0][:200]) from error
    return [StoredTensor(name, each["dtype"], tuple(each["shape"]), each["data"]) for name, each in found]
