"""Facts about this machine, and the control."""

from __future__ import annotations

import datetime
import os
import platform

import numpy
import psutil
import pytest

from latentrt.benchmarks.machine import Control, describe, now, system_facts, usable_cpus, versions


def test_the_machine_is_this_one() -> None:
    """Processors, memory and versions are those that the system and the packages state."""
    machine = describe()
    assert machine["cpus"] == usable_cpus() <= (os.cpu_count() or 1)
    assert machine["memory_bytes"] == psutil.virtual_memory().total
    assert machine["python"] == system_facts()["python"] == platform.python_version()
    assert machine["processor"]
    assert versions("numpy") == {"numpy": numpy.__version__}
    assert abs(datetime.datetime.fromisoformat(now()).timestamp() - datetime.datetime.now().timestamp()) < 60


def test_the_control_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is the seconds of its work, and work of that size takes some."""
    assert 1e-5 < Control().sample() < 10
