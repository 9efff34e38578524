"""Device memory of sessions: arrays that are handed out, one arena for activations, and the needs of a plan."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device import DLPACK_CUDA, dlpack_capsule
from ..errors import EngineError, EngineMemoryError, InvalidRequestError
from .cudart import Cuda, mib

ALIGNMENT = 256
"""Bytes that the SDKs want the addresses of tensors and activations to be multiples of."""

_KEPT = 64 << 20  # bytes of returned memory that a pool keeps for the next arrays


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to the next multiple of :data:`ALIGNMENT`, and at least that."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


@dataclass(frozen=True)
class MemoryNeeds:
    """Device memory that a plan takes, in bytes.

    Attributes:
        weights: Of the weights; with a weight streaming budget what of them is held at most.
        activations: Scratch memory at the profile's largest shapes. Smaller shapes take less, and components that
            share an :class:`Arena` take the largest of theirs once.
        io: Inputs and outputs at the largest shapes, for one run at a time.
    """

    weights: int
    activations: int
    io: int

    def __str__(self) -> str:
        return f"weights {mib(self.weights)}, activations up to {mib(self.activations)}, I/O up to {mib(self.io)}"


class Block:
    """Device memory that returns to its pool when nobody holds the block any more."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes


class Pool:
    """Device memory for arrays of changing life time. Allocating anew would stall the device, so some is kept.

    Args:
        cuda: The device.
        label: Name of the owner in messages.
    """

    def __init__(self, cuda: Cuda, label: str) -> None:
        self._cuda = cuda
        self._label = label
        # Blocks come back from finalizers, which may run anywhere, even inside take: so no lock, only atomic
        # calls; the count of bytes may be off a little, it is but a bound.
        self._kept: dict[int, deque[int]] = {}
        self._bytes = 0
        self._closed = threading.Event()

    def take(self, nbytes: int) -> Block:
        """A block of at least ``nbytes``.

        Raises:
            EngineMemoryError: if it does not fit.
        """
        size = aligned(nbytes)
        try:
            address = self._kept[size].pop()
            self._bytes -= size
        except (KeyError, IndexError):
            address = self._allocate(size)
        block = Block(address, size)
        weakref.finalize(block, self._take_back, address, size).atexit = False
        return block

    def _allocate(self, size: int) -> int:
        purpose = f"inputs and outputs of {self._label}"
        try:
            return self._cuda.malloc(size, purpose)
        except EngineMemoryError:
            self._free_kept()  # of other sizes, which may be what is lacking
            return self._cuda.malloc(size, purpose)

    def close(self) -> None:
        """Free the memory that is kept; memory still in use is freed when it is let go."""
        self._closed.set()
        self._free_kept()

    def _take_back(self, address: int, size: int) -> None:
        if self._closed.is_set() or self._bytes + size > _KEPT:
            self._cuda.free(address)
            return
        self._bytes += size
        self._kept.setdefault(size, deque()).append(address)
        if self._closed.is_set():  # closed between the two
            self._free_kept()

    def _free_kept(self) -> None:
        for size, addresses in list(self._kept.items()):
            with contextlib.suppress(IndexError):
                while True:
                    self._cuda.free(addresses.pop())
                    self._bytes -= size


class CudaArray:
    """An array on a CUDA device, complete when handed out; see :class:`latentrt.engines.device.DeviceArray`.

    Args:
        cuda: Its device.
        block: Memory that it lies in; held until the array is gone.
        offset: Where it begins there, in bytes.
        shape: Length of each dimension.
        dtype: One of :data:`latentrt.engines.base.DTYPES`.
    """

    def __init__(self, cuda: Cuda, block: Block, offset: int, shape: tuple[int, ...], dtype: str) -> None:
        self.cuda = cuda
        self.block = block
        self.address = block.address + offset
        self.shape = shape
        self.dtype = dtype
        self.nbytes = math.prod(shape) * itemsize(dtype)

    def __repr__(self) -> str:
        return f"CudaArray({self.dtype}{list(self.shape)} on cuda:{self.cuda.ordinal})"

    def numpy(self) -> NDArray[Any]:
        """A copy on the host.

        Raises:
            EngineError: if the copy fails, or numpy has no such element type.
        """
        if self.dtype == "bfloat16":
            raise EngineError("numpy has no bfloat16; take the array through DLPack, as torch.from_dlpack does")
        host = np.empty(self.shape, self.dtype)
        if self.nbytes:
            self.cuda.use()
            self.cuda.to_host(host.ctypes.data, self.address, self.nbytes)
        return host

    def write(self, host: NDArray[Any]) -> None:
        """Overwrite it from an array of its size, and wait for that."""
        host = np.ascontiguousarray(host)
        if self.nbytes:
            self.cuda.to_device(self.address, host.ctypes.data, self.nbytes)

    def __dlpack__(self, **options: Any) -> object:
        """A DLPack capsule of the same memory. Whatever stream the taker names, there is nothing to wait for.

        Raises:
            BufferError: if a copy or another device is asked for.
        """
        if options.get("copy") or options.get("dl_device") not in (None, self.__dlpack_device__()):
            raise BufferError(f"{self!r} can only be handed over where it is, without a copy")
        return dlpack_capsule(self.address, self.shape, self.dtype, self.__dlpack_device__(), self)

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's CUDA device type, and the ordinal."""
        return DLPACK_CUDA, self.cuda.ordinal


class Arena:
    """One piece of device memory for the activations of several plans, of which one runs at a time.

    Activations are worth nothing once a run is over, so the components of a pipeline share the memory of the one that
    needs most. It grows when a run needs more, and is freed when its last user has left.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._cuda: Cuda | None = None
        self._users = 0
        self._address = 0
        self.nbytes = 0
        """Bytes that are allocated now."""

    def join(self, cuda: Cuda) -> None:
        """Use the arena from now on.

        Raises:
            InvalidRequestError: if its other users are on another device.
        """
        with self._lock:
            if self._users and self._cuda is not None and self._cuda.ordinal != cuda.ordinal:
                raise InvalidRequestError(
                    f"an arena on device {self._cuda.ordinal} cannot serve device {cuda.ordinal}; give each its own"
                )
            self._cuda = cuda
            self._users += 1

    def leave(self) -> None:
        """Use it no more; the last to leave frees it."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._free()
                self._cuda = None

    @contextlib.contextmanager
    def reserve(self, nbytes: int, label: str) -> Iterator[tuple[int, int]]:
        """Have the arena for oneself; others wait. The device must be done with it when the with statement ends.

        Yields:
            Address and size. Another address than before means that all that was captured with the old one is void.

        Raises:
            EngineMemoryError: before anything is allocated, if ``nbytes`` do not fit.
        """
        with self._lock:
            cuda = self._cuda
            assert cuda is not None, "join comes first"
            if nbytes > self.nbytes:
                # Freed first: nothing in it is needed, and old and new together might not fit.
                self._free()
                advice = "use a smaller size or batch, or close other programs that use the GPU"
                self._address = cuda.malloc(aligned(nbytes), f"the activations of {label}", advice)
                self.nbytes = aligned(nbytes)
            yield self._address, self.nbytes

    def _free(self) -> None:
        if self.nbytes and self._cuda is not None:
            self._cuda.free(self._address)
        self._address = self.nbytes = 0
