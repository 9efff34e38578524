"""CUDA devices are those that the driver lists, whose library is make-believe here."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from latentrt.engines.trt.cuda import CudaDevice, cuda_devices


class FakeDriver:
    """The CUDA driver's functions, for devices given by name and compute capability."""

    def __init__(self, devices: list[tuple[bytes, int, int]], status: int = 0) -> None:
        self.devices = devices
        self.status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = self.devices[device.value][0]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.devices[device.value][{75: 1, 76: 2}[attribute]]
        return 0


def test_devices_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and compute capabilities are the driver's."""
    driver = FakeDriver([(b"NVIDIA H100", 9, 0), (b"NVIDIA RTX 5090", 12, 0)])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert cuda_devices() == (CudaDevice("NVIDIA H100", "sm_90"), CudaDevice("NVIDIA RTX 5090", "sm_120"))


def test_no_driver_and_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing driver, one that does not start, and one without devices all mean: none."""

    def missing(name: str) -> Any:
        raise OSError(name)

    for load in (missing, lambda name: FakeDriver([(b"x", 9, 0)], status=100), lambda name: FakeDriver([])):
        monkeypatch.setattr(ctypes, "CDLL", load)
        assert cuda_devices() == ()
