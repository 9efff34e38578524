"""One rule for all layers of what a whole number, a number, a flag and a choice is."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from latentrt.engines.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    is_integer,
    is_number,
    show,
)
from latentrt.engines.errors import BundleError, InvalidRequestError

HUGE = 10**5000
"""Python refuses to print it."""

WHOLE: list[Any] = [0, -3, 2**70, HUGE, *(kind(3) for kind in (np.int8, np.uint8, np.int32, np.int64, np.uint64))]
REAL: list[Any] = [0.5, -2.0, np.float16(0.5), np.float32(0.5), np.float64(0.5), Fraction(1, 3)]
NEITHER: list[Any] = [
    *(True, False, np.True_, np.False_),
    *("3", b"3", None, [3], {}, 1j, Decimal("0.5")),
    *(np.array(3), np.array(0.5), np.array([3]), np.complex64(1)),  # of no dimensions, too
    np.datetime64("2024-01-01"),
]
NOT_FINITE: list[Any] = [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), np.float16("-inf")]


@pytest.mark.parametrize("value", WHOLE, ids=lambda value: f"{type(value).__name__}")
def test_whole_numbers(value: Any) -> None:
    """Python's and numpy's integers of any size are whole numbers, and come back as Python's."""
    assert is_integer(value)
    received = check_integer("it", value, -10)
    assert (received, type(received)) == (value, int)


@pytest.mark.parametrize("value", [*REAL, *NEITHER, *NOT_FINITE], ids=lambda value: f"{type(value).__name__}")
def test_everything_else_is_no_whole_number(value: Any) -> None:
    """Nor is a float without a fraction, or an array of no dimensions."""
    assert not is_integer(value)
    with pytest.raises(InvalidRequestError, match=r"^it is .+, expected a whole number$"):
        check_integer("it", value, 0)


@pytest.mark.parametrize("value", [*REAL, 3, np.int16(3), np.uint8(3)], ids=lambda value: f"{type(value).__name__}")
def test_numbers(value: Any) -> None:
    """Floats, fractions and whole numbers of Python and numpy are numbers, and come back as Python's float."""
    assert is_number(value)
    received = check_number("it", value, -10, 10)
    assert (received, type(received)) == (float(value), float)


@pytest.mark.parametrize("value", NEITHER, ids=lambda value: f"{type(value).__name__}")
def test_everything_else_is_no_number(value: Any) -> None:
    """Booleans of either kind, texts and arrays are refused by their kind."""
    assert not is_number(value)
    with pytest.raises(InvalidRequestError, match=r"^it is .+, expected a number$"):
        check_number("it", value)


@pytest.mark.parametrize("value", [*NOT_FINITE, HUGE, -HUGE], ids=lambda value: f"{type(value).__name__}")
def test_numbers_are_finite(value: Any) -> None:
    """What is not finite, or no float could hold, is outside of every range."""
    assert not is_number(value)
    for limits, expected in (
        ((), "0 or more"),
        ((None,), "a finite number"),
        ((None, 2), "2 or less"),
        ((-1e-6, 2.5), "-1e-06 to 2.5"),
    ):
        with pytest.raises(InvalidRequestError, match=rf"^it is .+, expected {expected}$"):
            check_number("it", value, *limits)


def test_ranges_hold_both_ends() -> None:
    """The message says what was received, and the range; a hint follows it."""
    assert (check_integer("it", 1, 1, 3), check_integer("it", 3, 1, 3)) == (1, 3)
    assert (check_number("it", 1, 1, 3), check_number("it", np.float32(3), 1, 3)) == (1.0, 3.0)
    with pytest.raises(InvalidRequestError, match=r"^steps is 0, expected 1 to 9 \(20 is usual\)$"):
        check_integer("steps", np.int64(0), 1, 9, hint=" (20 is usual)")
    with pytest.raises(BundleError, match=r"^scale is 1.5, expected 0 to 1$"):
        check_number("scale", np.float64(1.5), 0, 1, error=BundleError)
    with pytest.raises(InvalidRequestError, match=r"^steps is an integer of 16610 bits, expected 1 to 9$"):
        check_integer("steps", HUGE, 1, 9)


def test_flags() -> None:
    """Booleans of Python and numpy are flags, and come back as Python's; numbers and texts are none."""
    for value in (True, False, np.True_, np.False_):
        received = check_flag("it", value)
        assert (received, type(received)) == (bool(value), bool)
    for other in (0, 1, 1.0, "true", None, np.int8(1), np.array(True)):
        with pytest.raises(InvalidRequestError, match=r"^it is .+, expected true or false$"):
            check_flag("it", other)


def test_choices() -> None:
    """Only a word of the list will do, whatever the list is made of."""
    assert check_choice("it", "a", iter(("a", "b"))) == "a"
    with pytest.raises(InvalidRequestError, match=r"^it is 'c', expected a or b$"):
        check_choice("it", "c", ("a", "b"))
    with pytest.raises(BundleError, match=r"^it is \['a'\], expected one of a, b, c$"):
        check_choice("it", ["a"], ("a", "b", "c"), error=BundleError)


def test_messages_are_short_and_never_fail() -> None:
    """Long values are cut, and numpy's numbers are shown like Python's."""
    assert show(np.int64(3)) == "3"
    assert show(np.float32(0.5)) == "0.5"
    assert len(show("x" * 10_000)) < 200
    assert show(HUGE) == "an integer of 16610 bits"
    assert show([HUGE]) == "a list of integers too long to show"
