"""The public stand-in for an engine."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

import latentrt.engines.fake
from latentrt.engines import FakeEngine, TensorSpec
from latentrt.engines.errors import TensorMismatchError

X = TensorSpec("x", "float32", (2,))
Y = TensorSpec("y", "float32", (2,))


def test_the_example_in_its_documentation_holds() -> None:
    """The docstring's example runs and gives what it says."""
    attempted = doctest.testmod(latentrt.engines.fake)
    assert attempted.attempted > 0
    assert attempted.failed == 0


def test_it_declares_what_it_was_given() -> None:
    """Specs come back by name."""
    with FakeEngine([X], [Y], lambda feeds: {"y": feeds["x"]}) as engine:
        assert engine.inputs == {"x": X}
        assert engine.outputs == {"y": Y}


def test_it_records_copies_of_its_inputs() -> None:
    """A caller that reuses a buffer does not change the record."""
    with FakeEngine([X], [Y], lambda feeds: {"y": feeds["x"]}) as engine:
        buffer = np.array([1, 2], np.float32)
        engine.run({"x": buffer})
        buffer[:] = 3
        engine.run({"x": buffer})
    assert [call["x"].tolist() for call in engine.calls] == [[1, 2], [3, 3]]


def test_it_checks_as_a_real_engine_does() -> None:
    """Wrong feeds are refused before the function is called."""
    with (
        FakeEngine([X], [Y], lambda feeds: {"y": feeds["x"]}) as engine,
        pytest.raises(TensorMismatchError, match=r"has shape \(3,\)"),
    ):
        engine.run({"x": np.zeros(3, np.float32)})


def test_what_the_function_raises_passes_through() -> None:
    """A test can make an engine fail as it likes."""
    with FakeEngine([], [Y], lambda feeds: {"y": 1 / 0}) as engine, pytest.raises(ZeroDivisionError):  # type: ignore[dict-item]
        engine.run({})
