"""Fixtures that tests of several rooms of the benchmarks share."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentrt.benchmarks.contest import rounds


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of ``fake_contender.py``, which contests start in place of LatentRT's worker, without rests."""
    command = [sys.executable, str(Path(__file__).with_name("fake_contender.py"))]
    monkeypatch.setattr(rounds, "own_command", lambda: command)
    monkeypatch.setattr(rounds, "_REST", 0)
    return command


@pytest.fixture
def steady_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control takes the same time at any load, as fake contenders say of themselves."""
    monkeypatch.setattr(rounds, "Control", lambda: SimpleNamespace(sample=lambda: 0.01))
