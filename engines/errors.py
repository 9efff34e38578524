"""Every error that LatentRT raises on purpose.

One base, :class:`LatentRTError`; each class also inherits the builtin that fits, so that code which
knows nothing of LatentRT (``except ValueError``) still does the right thing. A message is one sentence
that says which value was received, which was expected and, where there is one, the way out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class LatentRTError(Exception):
    """Base of all errors of this package."""


class InvalidRequestError(LatentRTError, ValueError):
    """A request cannot be served as asked: a size, a step count, a sampler, a guidance scale."""


class TensorMismatchError(LatentRTError, ValueError):
    """A tensor's name, dtype or shape is none that an engine takes."""


class BundleError(LatentRTError, ValueError):
    """A bundle is missing, damaged, hostile, or lacks a part that was asked for."""


class BundleVersionError(BundleError):
    """A bundle was written in a format that this version does not read."""


class BundleIntegrityError(BundleError):
    """A file of a bundle is not the one its manifest lists: size, hash, kind or place differ."""


class SourceError(LatentRTError, ValueError):
    """A model to export, or a LoRA, is missing, damaged, or of a kind that is not supported."""


class ExportError(LatentRTError, RuntimeError):
    """A component could not be turned into ONNX."""


class VerificationError(ExportError):
    """An exported component or engine computes other values than its source."""


class EngineError(LatentRTError, RuntimeError):
    """An inference SDK failed; the SDK's own exception is the cause."""


class EngineUnavailableError(EngineError):
    """An engine cannot run or build here: its package or its device is missing."""


class EngineMemoryError(EngineError, MemoryError):
    """A device has too little free memory for a request."""


class EngineClosedError(EngineError):
    """An engine was used before it was opened or after it was closed."""


class OutputError(LatentRTError, OSError):
    """A result could not be written; nothing was left half written."""


@contextlib.contextmanager
def translated(what: str, *, line: int = 0) -> Iterator[None]:
    """Turn any exception of an SDK into an :class:`EngineError`, with the SDK's own as its cause.

    Args:
        what: The action that failed; the message begins with it.
        line: Index of the line of the SDK's message that gives the reason: ONNX Runtime puts it first, OpenVINO last.

    Raises:
        EngineError: from any exception that is not LatentRT's own.
    """
    try:
        yield
    except LatentRTError:
        raise
    except Exception as error:
        # OpenVINO says where in its sources it failed, before it says why.
        lines = [each for each in map(str.strip, str(error).splitlines()) if each and "Exception from " not in each]
        raise EngineError(f"{what}: {lines[line][:300] if lines else type(error).__name__}") from error
