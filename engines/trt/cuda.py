"""CUDA devices of this machine, as the driver itself lists them; no CUDA package is needed for that."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

# CUdevice_attribute, CUDA Driver API reference.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class CudaDevice:
    """A GPU that the CUDA driver offers.

    Attributes:
        name: The driver's name of it, e.g. ``"NVIDIA H100 80GB HBM3"``.
        architecture: Its compute capability, e.g. ``"sm_90"``.
    """

    name: str
    architecture: str


def cuda_devices() -> tuple[CudaDevice, ...]:
    """All devices, in the driver's order; none if there is no driver, or the driver finds none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    devices = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        failed = (
            driver.cuDeviceGet(ctypes.byref(device), ordinal)
            or driver.cuDeviceGetName(name, len(name), device)
            or driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
            or driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
        )
        if not failed:
            devices.append(CudaDevice(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}"))
    return tuple(devices)


def no_device(engine: str) -> str:
    """The sentence for an engine that needs a GPU, on a machine without one."""
    return f"{engine} needs an NVIDIA GPU and its driver, and no CUDA device was found; use the engine onnxruntime"
