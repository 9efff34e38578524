"""Files that save the SDKs work they did before: timings of kernels at builds, compiled kernels at runs.

Losing one costs time and nothing else, so a damaged one is named in a warning and made anew. A file begins with a
magic number and the SHA-256 of the rest; it appears in one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from pathlib import Path

_logger = logging.getLogger("latentrt.engines.trt")

_MAGIC = b"LatentRT cache 1\n"
_HEADER = len(_MAGIC) + 32


def read_cache(path: Path, what: str) -> bytes:
    """The content that :func:`write_cache` wrote; empty if there is no file, or none that is sound.

    Args:
        path: The file.
        what: Kind of the content, for the warning about a damaged one, e.g. ``"runtime cache"``.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        _logger.warning("the %s %s cannot be read (%s) and is made anew", what, path, error.strerror or error)
        return b""
    body = content[_HEADER:]
    if content[:_HEADER] != _MAGIC + hashlib.sha256(body).digest():
        _logger.warning("the %s %s is damaged and is made anew", what, path)
        return b""
    return body


def write_cache(path: Path, body: bytes, what: str) -> None:
    """Write a file beside ``path`` and rename it into place; a failure is logged, for nothing depends on the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _logger.warning("the %s %s cannot be written: %s", what, path, error.strerror or error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
