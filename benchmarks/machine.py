"""Facts about the machine of a run, and a control that shows how steady its speed was."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from latentrt.engines.trt.cuda import cuda_devices

from .report.types import Machine

_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")

CONTROL = "a product of two fp32 matrices of 512x512 in numpy, eight times, once a round"
"""Description of the control's work."""


def describe() -> Machine:
    """The machine, as a report of ``latentrt bench`` describes it."""
    facts = _cpuinfo()
    flags = set(facts.get("flags", "").split())
    return {
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "cpus": usable_cpus(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "governor": _GOVERNOR.read_text().strip() if _GOVERNOR.is_file() else None,
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "gpus": [f"{device.name} ({device.architecture})" for device in cuda_devices()],
        "python": platform.python_version(),
        "latentrt": importlib.metadata.version("latentrt"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def system_facts() -> dict[str, Any]:
    """The facts that a small report states: processors, operating system and Python's version."""
    return {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages, by name.

    Raises:
        importlib.metadata.PackageNotFoundError: if one is not installed.
    """
    return {package: importlib.metadata.version(package) for package in packages}


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def now() -> str:
    """The current time in UTC, in ISO 8601's format."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Control:
    """A fixed piece of work that no contender takes part in: its time changes only where the machine's speed does."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._left = generator.standard_normal((512, 512), np.float32)
        self._right = generator.standard_normal((512, 512), np.float32)
        self.sample()  # threads start at the first product

    def sample(self) -> float:
        """Do the work once; returns its seconds."""
        begin = time.perf_counter()
        for _ in range(8):
            self._left @ self._right
        return time.perf_counter() - begin


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of ``/proc/cpuinfo``; empty where there is none."""
    if not _CPUINFO.is_file():
        return {}
    first = _CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
