"""TensorRT and TensorRT-RTX as one SDK: loading either, its log, its failures.

The two Python modules share one API, so everything else in this package takes an :class:`Sdk` and does not ask
which it is, save where the products differ: TensorRT builds on and for the GPU of this machine, TensorRT-RTX
builds without one, for a set of compute capabilities.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import EngineError, EngineUnavailableError, LatentRTError

SDK_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Engine name -> Python module of its SDK."""

_OLDEST = {"tensorrt-rtx": (1, 2), "tensorrt": (10, 13)}
_TITLES = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
_KEPT_ERRORS = 16

_logger = logging.getLogger("latentrt.engines.trt")
_logger.addHandler(logging.NullHandler())  # no application that leaves logging alone gets the SDK's chatter on stderr


@dataclass(frozen=True)
class Sdk:
    """A loaded SDK.

    Attributes:
        name: ``"tensorrt-rtx"`` or ``"tensorrt"``, as engines are named.
        module: The Python module.
    """

    name: str
    module: ModuleType

    @property
    def version(self) -> str:
        """Version of the SDK, in full."""
        return str(self.module.__version__)

    @property
    def title(self) -> str:
        """Name for people, with the version."""
        return f"{_TITLES[self.name]} {self.version}"

    @property
    def builds_without_gpu(self) -> bool:
        """Whether a plan can be built on a machine without a GPU."""
        return self.name == "tensorrt-rtx"

    @property
    def compiles_at_runtime(self) -> bool:
        """Whether kernels are compiled for the GPU when a plan runs, and worth keeping in a runtime cache."""
        return self.name == "tensorrt-rtx"


def load_sdk(name: str) -> Sdk:
    """Import an SDK.

    Args:
        name: ``"tensorrt-rtx"`` or ``"tensorrt"``.

    Raises:
        EngineUnavailableError: if it is unknown, not installed, cannot be loaded, or too old.
    """
    if name not in SDK_MODULES:
        raise EngineUnavailableError(f"no SDK is called {name!r}; expected one of {', '.join(SDK_MODULES)}")
    oldest = ".".join(map(str, _OLDEST[name]))
    install = f'install it with: pip install "latentrt[{name}]"'
    try:
        module = importlib.import_module(SDK_MODULES[name])
    except ImportError as error:
        # Its own name missing means not installed; any other failure is the SDK's and worth seeing.
        reason = "is not installed" if error.name == SDK_MODULES[name] else f"cannot be imported ({error})"
        raise EngineUnavailableError(f"{_TITLES[name]} {reason}; {install}") from error
    except (OSError, RuntimeError) as error:
        raise EngineUnavailableError(f"{_TITLES[name]} cannot be loaded ({error}); {install}") from error
    if not hasattr(module, "__version__"):  # an empty namespace: the package of the SDK's type stubs leaves one
        raise EngineUnavailableError(f"{_TITLES[name]} is not installed; {install}")
    sdk = Sdk(name, module)
    if tuple(int(part) for part in sdk.version.split(".")[:2]) < _OLDEST[name]:
        raise EngineUnavailableError(f"{sdk.title} is too old, {oldest} or newer is needed; {install}")
    return sdk


class SdkLog:
    """The SDK's log: every message goes to :mod:`logging`, and errors are kept for the exception that they explain.

    Attributes:
        handle: The object that the SDK takes as its logger.
    """

    def __init__(self, module: Any) -> None:
        severity = module.ILogger.Severity
        levels = {
            severity.INTERNAL_ERROR: logging.ERROR,
            severity.ERROR: logging.ERROR,
            severity.WARNING: logging.WARNING,
            severity.INFO: logging.DEBUG,
        }
        captures: list[tuple[int, list[str]]] = []
        lock = threading.Lock()

        class Logger(module.ILogger):  # type: ignore[misc]  # the base is only known at run time
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                level = levels.get(severity)
                if level is None:
                    return  # VERBOSE: many messages a layer
                _logger.log(level, "%s", message)
                if level == logging.ERROR:
                    with lock:
                        # A run's errors are logged by its own thread; those of the SDK's threads may be anybody's.
                        own = [errors for thread, errors in captures if thread == threading.get_ident()]
                        for errors in own or [errors for _, errors in captures]:
                            errors.append(message)
                            del errors[:-_KEPT_ERRORS]

        self.handle = Logger()
        self._captures = captures
        self._lock = lock

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[str]]:
        """Collect the last errors that are logged inside the with statement, oldest first."""
        errors: list[str] = []
        with self._lock:
            self._captures.append((threading.get_ident(), errors))
        try:
            yield errors
        finally:
            with self._lock:
                # By identity: two captures with the same messages are equal lists.
                self._captures[:] = [capture for capture in self._captures if capture[1] is not errors]


@functools.cache
def sdk_log(sdk: Sdk) -> SdkLog:
    """The one log of an SDK. (It keeps its first logger for the whole process.)"""
    return SdkLog(sdk.module)


@contextlib.contextmanager
def sdk_errors(sdk: Sdk, action: str) -> Iterator[list[str]]:
    """Translate exceptions of the SDK.

    Args:
        sdk: The SDK that is called inside the with statement.
        action: The action, to complete "TensorRT failed to ...".

    Yields:
        The errors that the SDK logs meanwhile; see :func:`failure` for calls that fail without raising.

    Raises:
        EngineError: from any exception that is not LatentRT's own; the message holds the SDK's reason.
    """
    with sdk_log(sdk).capture() as errors:
        try:
            yield errors
        except LatentRTError:
            raise
        except Exception as error:
            raise failure(sdk, action, errors or [str(error) or type(error).__name__]) from error


def failure(sdk: Sdk, action: str, errors: list[str]) -> EngineError:
    """The exception for a failed call, with the first of the errors logged: the later ones follow from it."""
    reason = " ".join(errors[0].split()) if errors else "it gave no reason"
    return EngineError(f"{sdk.title} failed to {action}: {reason}")
