"""Validators of single values, for all layers: one rule for whole numbers, numbers, flags and words of a list.

- numpy's integers and floats count as numbers, and its booleans as flags, wherever Python's do; the returned value is
  Python's.
- A boolean is never a number, a float such as ``2.0`` never a whole number, a text never either, and no number is NaN
  or infinite. An integer too large for a float is a whole number, but no number.
- An array is no number, even one of no dimensions: ``array.item()`` is one.
- JSON has none of numpy's types, so values read from a file are checked by the same rule.

Every message is one sentence: the name, the value received, the value expected.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np

from .errors import InvalidRequestError, LatentRTError

_SHORT = reprlib.Repr()
_SHORT.maxstring = 120


def show(value: object) -> str:
    """A value as a message shows it: short, numpy's numbers like Python's, and integers of any length safely."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print very long integers, here inside of a container
        return f"a {type(value).__name__} of integers too long to show"


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number: an ``int`` or one of numpy's integers, and no boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite real number: Python's or numpy's, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False


def check_integer(
    name: str,
    value: Any,
    least: int,
    most: int | None = None,
    *,
    error: type[LatentRTError] = InvalidRequestError,
    hint: str = "",
) -> int:
    """A whole number from ``least`` to ``most``, as Python's ``int``.

    Args:
        name: Name of the value in the message.
        value: The value.
        least: The smallest value that is allowed.
        most: The largest value that is allowed; ``None`` sets no limit.
        error: The class to raise.
        hint: Text to add to the message about a wrong range, with a space or punctuation of its own before it.

    Raises:
        LatentRTError: of class ``error``.
    """
    if not is_integer(value):
        raise error(f"{name} is {show(value)}, expected a whole number")
    number = int(value)
    if number < least or (most is not None and number > most):
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise error(f"{name} is {show(number)}, expected {expected}{hint}")
    return number


def check_number(
    name: str,
    value: Any,
    least: float | None = 0,
    most: float | None = None,
    *,
    error: type[LatentRTError] = InvalidRequestError,
    hint: str = "",
) -> float:
    """A finite number from ``least`` to ``most``, as Python's ``float``.

    Arguments are those of :func:`check_integer`, save that ``least`` may be ``None``, too.

    Raises:
        LatentRTError: of class ``error``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise error(f"{name} is {show(value)}, expected a number")
    if not is_number(value) or (least is not None and value < least) or (most is not None and value > most):
        if least is None:
            expected = "a finite number" if most is None else f"{most:g} or less"
        else:
            expected = f"{least:g} or more" if most is None else f"{least:g} to {most:g}"
        raise error(f"{name} is {show(value)}, expected {expected}{hint}")
    return float(value)


def check_flag(name: str, value: Any, *, error: type[LatentRTError] = InvalidRequestError) -> bool:
    """A truth value, Python's or numpy's; numbers and strings are none.

    Raises:
        LatentRTError: of class ``error``.
    """
    if not isinstance(value, bool | np.bool_):
        raise error(f"{name} is {show(value)}, expected true or false")
    return bool(value)


def check_choice(
    name: str, value: Any, known: Iterable[str], *, error: type[LatentRTError] = InvalidRequestError
) -> str:
    """One of a few words.

    Raises:
        LatentRTError: of class ``error``.
    """
    words = list(known)
    if not isinstance(value, str) or value not in words:
        expected = " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"
        raise error(f"{name} is {show(value)}, expected {expected}")
    return value
