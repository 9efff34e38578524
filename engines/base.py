"""The engine protocol: named tensors in, named tensors out.

The checks of names, dtypes and shapes live here, once: of inputs before the SDK sees a tensor, of outputs before a
caller does.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .checks import is_integer, show
from .errors import EngineClosedError, EngineError, InvalidRequestError, LatentRTError, TensorMismatchError

Array: TypeAlias = NDArray[Any]
"""A numpy array, or from and to an engine that says ``on_device`` a :class:`~latentrt.engines.device.DeviceArray`.

The type is numpy's, which all engines take; who may meet the other calls :func:`~latentrt.engines.device.to_numpy`.
"""

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
"""Names of the element types that a tensor of a bundle may have."""

_NUMPY_DTYPES = {name: np.dtype(name) for name in DTYPES if name != "bfloat16"}

MAX_THREADS = 1024
"""Most threads of an engine on a CPU; the SDK starts all of them at once."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and symbolic shape of an engine's input or output.

    Attributes:
        name: Name in the graph.
        dtype: One of :data:`DTYPES`.
        shape: One entry a dimension: a length, or the name of a symbol such as ``"batch"``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@runtime_checkable
class Engine(Protocol):
    """A compiled component. ``open`` before use; opening, running and closing are safe from many threads."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        ...

    def open(self) -> Self:
        """Load the graph into the SDK; a second call does nothing. Returns the engine itself."""
        ...

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Keep these inputs (on the device, where there is one) for this thread's runs until bound again.

        An array must not be changed while it is bound: some engines copy it, some do not.
        """
        ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute all outputs from ``feeds`` and the inputs that are bound."""
        ...

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        ...


Symbols: TypeAlias = dict[str, tuple[int, str]]
"""Lengths of symbols in one call, each with the tensor that it was read from, such as ``"input 'sample'"``."""


def check_feeds(inputs: Mapping[str, TensorSpec], feeds: Mapping[str, Array]) -> Symbols:
    """Check names, dtypes and shapes of ``feeds`` against ``inputs``.

    A symbol must stand for one length throughout a call.

    Returns:
        The lengths of the inputs' symbols.

    Raises:
        TensorMismatchError: naming the tensor, the value received and the one expected.
    """
    return _check("input", inputs, feeds, {}, (), TensorMismatchError)


def check_outputs(
    outputs: Mapping[str, TensorSpec],
    received: Mapping[str, Array],
    symbols: Symbols,
    shapeless: Collection[str] = (),
    lengths: bool = True,
) -> None:
    """Check names, dtypes and shapes of computed outputs against the declared ones.

    A symbol of an input keeps the length that it has there. A symbol that only outputs have must stand for one length
    throughout them.

    Args:
        outputs: The declared outputs.
        received: The computed ones; on a device too, since nothing is copied.
        symbols: Lengths of the inputs' symbols, from :func:`check_feeds`.
        shapeless: Outputs whose graph declares no shape; any is right.
        lengths: Whether the lengths must be the declared ones; if not, the number of dimensions must be.

    Raises:
        EngineError: naming the tensor, the value received and the one expected.
    """
    _check("output", outputs, received, dict(symbols), shapeless, EngineError, lengths=lengths)


def _check(
    kind: str,
    specs: Mapping[str, TensorSpec],
    arrays: Mapping[str, Array],
    symbols: Symbols,
    shapeless: Collection[str],
    error: type[LatentRTError],
    *,
    lengths: bool = True,
) -> Symbols:
    """Check arrays against specs; ``symbols`` holds lengths that are known, and gets those that are found."""
    if missing := [name for name in specs if name not in arrays]:
        raise error(f"missing {kind} {missing[0]!r}; expected {_join(specs)}, received {_join(arrays)}")
    if unknown := [name for name in arrays if name not in specs]:
        raise error(f"unknown {kind} {unknown[0]!r}; expected {_join(specs)}")
    for name, spec in specs.items():
        array, label = arrays[name], f"{kind} {name!r}"
        if not (hasattr(array, "dtype") and hasattr(array, "shape")):
            raise error(f"{label} is a {type(array).__name__}, expected an array {spec}")
        # The name of a numpy dtype takes microseconds to make, and a step has dozens of inputs.
        if array.dtype is not _NUMPY_DTYPES.get(spec.dtype) and str(array.dtype) != spec.dtype:
            raise error(f"{label} is {array.dtype}, expected {spec.dtype}")
        if name in shapeless:
            continue
        if len(array.shape) != len(spec.shape):
            raise error(f"{label} has shape {tuple(array.shape)}, expected {spec}")
        if not lengths:
            continue
        for length, expected in zip(array.shape, spec.shape, strict=True):
            if isinstance(expected, str):
                known, where = symbols.setdefault(expected, (length, label))
                if known != length:
                    raise error(f"{label} has {expected}={length}, but {where} has {expected}={known}")
            elif expected != length:
                raise error(f"{label} has shape {tuple(array.shape)}, expected {spec}")
    return symbols


def _kinds(arrays: Mapping[str, Array]) -> dict[str, tuple[Any, Any]] | None:
    """Element types and shapes by name; ``None`` where something is no array."""
    try:
        return {name: (array.dtype, array.shape) for name, array in arrays.items()}
    except AttributeError:
        return None


def _join(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none"


class BaseEngine(ABC):
    """Shared part of the engines: bound inputs, checks, the closed state and the context manager.

    A subclass implements :meth:`_open`, which returns inputs and outputs, :meth:`_run` and :meth:`_close`.
    """

    on_device = False
    """Whether :meth:`run` hands out device arrays, and takes them back without a copy through the host."""

    loose_outputs = False
    """Whether nobody compared the graph with its source: then the lengths that it declares for outputs are not checked.

    Graphs of others may declare some wrongly and compute the right thing; ONNX Runtime, too, only warns of it."""

    def __init__(self, label: str) -> None:
        self.label = label
        """Name of this engine in messages, e.g. ``"unet (onnxruntime)"``."""
        self._inputs: Mapping[str, TensorSpec] = {}
        self._outputs: Mapping[str, TensorSpec] = {}
        self._shapeless: frozenset[str] = frozenset()  # outputs whose graph declares no shape; set while opening
        self._local = threading.local()
        self._opened = False
        self._lock = threading.Lock()

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        self._require_open()
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        self._require_open()
        return self._outputs

    def _require_open(self) -> None:
        if not self._opened:
            raise EngineClosedError(f"{self.label} is not open; call open() first, or use it in a with statement")

    def open(self) -> Self:
        """Load the graph into the SDK; a second call does nothing."""
        with self._lock:
            if not self._opened:
                self._inputs, self._outputs = self._open()
                self._opened = True
        return self

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Keep ``feeds`` as inputs of this thread's following runs; a name bound again is replaced.

        Shapes and element types are checked by :meth:`run`, where they meet the other inputs.

        Raises:
            TensorMismatchError: for a name that is no input.
        """
        self._require_open()
        if unknown := [name for name in feeds if name not in self._inputs]:
            raise TensorMismatchError(f"{self.label}: unknown input {unknown[0]!r}; expected {_join(self._inputs)}")
        self._local.__dict__.setdefault("bound", {}).update(feeds)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute all outputs.

        Args:
            feeds: Every input that is not bound, by name; a name that is bound is overridden for this run.

        Raises:
            TensorMismatchError: before the SDK is called, if an input is not as declared.
            EngineError: if the SDK fails, or an output is not as declared.
        """
        self._require_open()
        local = self._local.__dict__
        merged = {**local.get("bound", {}), **feeds}
        # A loop's steps take and give the same names, types and shapes again and again: those of this thread's last run
        # are known good.
        given = _kinds(merged)
        if given is None or given != local.get("given"):
            try:
                local["symbols"] = check_feeds(self._inputs, merged)
            except TensorMismatchError as error:
                raise TensorMismatchError(f"{self.label}: {error}") from None
            local["given"], local["received"] = given, None
        found = self._run(merged)
        received = _kinds(found)
        if received is None or received != local["received"]:
            try:
                check_outputs(self._outputs, found, local["symbols"], self._shapeless, lengths=not self.loose_outputs)
            except EngineError as error:
                raise EngineError(f"{self.label} broke its declaration: {error}") from None
            local["received"] = received
        return found

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        with self._lock:
            if self._opened:
                self._opened = False
                self._local = threading.local()
                self._close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]: ...

    @abstractmethod
    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]: ...

    def _close(self) -> None:
        return None


def check_threads(threads: object) -> int:
    """Check a number of threads inside an operator; 0 leaves the choice to the SDK.

    Raises:
        InvalidRequestError: naming the value received and the range.
    """
    if not is_integer(threads) or not 0 <= threads <= MAX_THREADS:
        raise InvalidRequestError(f"threads is {show(threads)}, expected 0 (automatic) to {MAX_THREADS}")
    return int(threads)


def nbytes(spec: TensorSpec, lengths: Mapping[str, int]) -> int:
    """Size of a tensor in bytes once its symbols have lengths.

    Raises:
        KeyError: for a symbol without a length.
    """
    item = 2 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).itemsize
    return item * math.prod(size if isinstance(size, int) else lengths[size] for size in spec.shape)
