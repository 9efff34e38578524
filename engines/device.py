"""Arrays that stay on a device: those that an engine on a GPU hands out, and their way back to numpy.

Copies are explicit: a device array has no ``__array__``, so numpy never fetches one unasked. Other frameworks take one
without a copy through DLPack, e.g. ``torch.from_dlpack(array)``.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .errors import TensorMismatchError

DLPACK_CPU, DLPACK_CUDA = 1, 2
"""``DLDeviceType`` of DLPack."""


@runtime_checkable
class DeviceArray(Protocol):
    """A dense array in C order on a device. It is complete when it is handed out, and never written to afterwards."""

    @property
    def dtype(self) -> Any:
        """Element type; its ``str`` is one of :data:`latentrt.engines.base.DTYPES`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dimension."""
        ...

    def numpy(self) -> NDArray[Any]:
        """A copy on the host."""
        ...

    def __dlpack__(self, **options: Any) -> Any:
        """A DLPack capsule of the same memory."""
        ...

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack device type and ordinal."""
        ...


def to_numpy(array: Any) -> NDArray[Any]:
    """A numpy array as it is; a device array as a copy on the host.

    Raises:
        TensorMismatchError: for anything else.
        EngineError: if the copy fails.
    """
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, DeviceArray):
        return array.numpy()
    raise TensorMismatchError(f"received a {type(array).__name__}, expected a numpy array or a device array")


class _Tensor(ctypes.Structure):
    """``DLManagedTensor`` of DLPack's ``dlpack.h``: ``dl_tensor``, ``manager_ctx`` and ``deleter`` in a row."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_CODES = {
    "int8": (0, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "float16": (2, 16),
    "float32": (2, 32),
    "bfloat16": (4, 16),
    "bool": (6, 8),
}
_NAME = b"dltensor"
_exported: dict[int, tuple[Any, ...]] = {}  # objects that must live as long as another framework uses them, by address


def _let_go(tensor: int) -> None:
    _exported.pop(tensor, None)


def _let_go_untaken(capsule: int) -> None:
    # A capsule that was taken has another name, and its taker calls the deleter.
    if _capsule_is_valid(capsule, _NAME):
        _let_go(_capsule_pointer(capsule, _NAME))


_delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_let_go)
_destroy = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_let_go_untaken)
# The destructor gets a capsule whose last reference is gone: it must be passed on as a bare address.
_capsule_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def dlpack_capsule(address: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int], owner: object) -> object:
    """A DLPack capsule of memory in C order.

    Args:
        address: Of the first element.
        shape: Length of each dimension.
        dtype: One of :data:`latentrt.engines.base.DTYPES`.
        device: DLPack device type and ordinal.
        owner: Kept alive until the capsule, or whoever takes it, lets go.
    """
    lengths = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    code, bits = _CODES[dtype]
    tensor = _Tensor(
        address,
        *device,
        len(shape),
        code,
        bits,
        1,
        ctypes.cast(lengths, ctypes.POINTER(ctypes.c_int64)),
        None,
        0,
        None,
        ctypes.cast(_delete, ctypes.c_void_p).value,
    )
    place = ctypes.addressof(tensor)
    _exported[place] = tensor, lengths, owner
    return _capsule_new(place, _NAME, ctypes.cast(_destroy, ctypes.c_void_p).value)
