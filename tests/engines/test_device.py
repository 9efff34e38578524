"""Arrays on a device: the way to numpy, and to other frameworks through DLPack."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from latentrt.engines import device
from latentrt.engines.device import DLPACK_CPU, DeviceArray, dlpack_capsule, to_numpy
from latentrt.engines.errors import TensorMismatchError


class OnHost:
    """A device array whose device is the host."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.dtype, self.shape = values.dtype, values.shape

    def numpy(self) -> Any:
        return self.values.copy()

    def __dlpack__(self, **options: Any) -> Any:
        return dlpack_capsule(self.values.ctypes.data, self.shape, str(self.dtype), (DLPACK_CPU, 0), self)

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPACK_CPU, 0


def test_to_numpy() -> None:
    """A numpy array is itself, a device array a copy, anything else an error."""
    values = np.arange(6.0)
    assert to_numpy(values) is values
    array = OnHost(values)
    assert isinstance(array, DeviceArray)
    np.testing.assert_array_equal(to_numpy(array), values)
    with pytest.raises(TensorMismatchError, match="received a list, expected a numpy array or a device array"):
        to_numpy([1, 2])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "int8", "uint8"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), ()])
def test_dlpack(dtype: str, shape: tuple[int, ...]) -> None:
    """Other libraries see the same memory, and keep the owner alive for as long as they do."""
    array = OnHost(np.ones(shape, dtype))
    taken = np.from_dlpack(array)
    assert (taken.dtype, taken.shape) == (array.dtype, shape)
    array.values[...] = 7
    np.testing.assert_array_equal(taken, array.values)
    alive = weakref.ref(array)
    del array
    gc.collect()
    assert alive() is not None
    del taken
    gc.collect()
    assert alive() is None
    assert device._exported == {}


def test_dlpack_to_torch() -> None:
    """PyTorch takes it as well, bool among the types."""
    torch = pytest.importorskip("torch", reason="PyTorch is part of an optional extra")
    array = OnHost(np.array([[True, False]]))
    assert torch.from_dlpack(array).tolist() == [[True, False]]


def test_a_capsule_that_nobody_took() -> None:
    """It lets go of the owner by itself."""
    array = OnHost(np.ones(3, np.float32))
    capsule = array.__dlpack__()
    assert len(device._exported) == 1
    del capsule
    assert device._exported == {}
