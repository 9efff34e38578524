"""Paths and files of a bundle: which may be named, and whether a file is one of the bundle's own."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from latentrt.engines.checks import show
from latentrt.engines.errors import BundleError, BundleIntegrityError

# Windows reserves these names with any ending; opening one there opens a device.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.ASCII | re.IGNORECASE)
_FORBIDDEN = frozenset('<>:"|?*\\')


def check_text(value: object, key: str, *, limit: int = 4096, empty: bool = False) -> str:
    """Return ``value`` if it is a text of at most ``limit`` characters that can be written as UTF-8.

    Args:
        value: The value.
        key: Its name in messages.
        limit: Most characters.
        empty: Whether a text without any character will do.

    Raises:
        BundleError: naming the key.
    """
    if not isinstance(value, str):
        expected = "a text"
    elif not value and not empty:
        expected = "a text that is not empty"
    elif len(value) > limit:
        expected = f"at most {limit} characters"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        expected = "valid Unicode"
    else:
        return value
    raise BundleError(f"{key} is {show(value)}, expected {expected}")


def check_path(value: object, key: str) -> str:
    """Return ``value`` if it is a path that may appear in a bundle.

    Such a path is relative, has ``/`` between its parts, cannot leave the bundle, and names one and the same
    file on every operating system (so no drive letters, device names, reserved characters, or trailing dots).

    Args:
        value: The value.
        key: Its name in messages.

    Raises:
        BundleError: naming the key.
    """
    path = check_text(value, key, limit=1024)
    if reason := _path_fault(path):
        raise BundleError(f"{key} is {show(path)}, which {reason}; expected a plain path inside the bundle")
    return path


def _path_fault(path: str) -> str | None:
    if path.startswith("/"):
        return "is absolute"
    if "_ORT_MEM_ADDR_" in path:
        return "is a marker for an address in memory"
    if any(character in _FORBIDDEN or not character.isprintable() for character in path):
        return "holds a character that paths of a bundle may not have"
    for part in path.split("/"):
        if not part:
            return "has an empty part"
        if part == "..":
            return "leaves its directory"
        if part != part.strip(" ") or part.endswith("."):
            return "has a part that begins or ends with a space or ends with a dot"
        if len(part.encode()) > 255:
            return "has a part of more than 255 bytes"
        if _DEVICE.fullmatch(part):
            return "has a part that is a device's name on Windows"
    return None


def plain_file(root: Path, relative: str) -> os.stat_result:
    """Look at a file of a bundle without following a link.

    Args:
        root: Directory of the bundle; links in its own path are the caller's business.
        relative: Path below it, with ``/`` between its parts.

    Returns:
        The file's status.

    Raises:
        BundleIntegrityError: if it is missing, not a regular file, or a link, or lies in a linked directory.
    """
    *parents, _ = parts = relative.split("/")
    path = root
    for depth, part in enumerate(parts):
        path = path / part
        try:
            status = path.lstat()
        except (OSError, ValueError) as error:
            raise BundleIntegrityError(f"{root} lacks the file {relative!r} that its manifest lists") from error
        if stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", None):
            raise BundleIntegrityError(f"{path} is a symbolic link; a bundle may only hold regular files")
        if not (stat.S_ISDIR(status.st_mode) if depth < len(parents) else stat.S_ISREG(status.st_mode)):
            kind = "a directory" if depth < len(parents) else "a regular file"
            raise BundleIntegrityError(f"{path} is not {kind}, as the manifest of the bundle says")
    if status.st_nlink > 1:
        raise BundleIntegrityError(
            f"{path} is a hard link ({status.st_nlink} names for one file); a bundle may only hold files of its own"
        )
    return status
