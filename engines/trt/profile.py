"""Optimisation profiles: the input shapes that a plan takes, and those that it is tuned for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from ..base import TensorSpec
from ..checks import is_integer, show
from ..errors import InvalidRequestError

_RANGE = re.compile(r"([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9})|([0-9]{1,9})")


@dataclass(frozen=True)
class Range:
    """Lengths that one symbolic dimension may take.

    Attributes:
        min: Smallest length, at least 1.
        opt: Length that the plan is tuned for.
        max: Largest length.

    Raises:
        InvalidRequestError: unless all three are whole numbers and 1 <= min <= opt <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        for name in ("min", "opt", "max"):
            if not is_integer(length := getattr(self, name)):
                raise InvalidRequestError(f"{name} of a range is {show(length)}, expected a whole number")
            object.__setattr__(self, name, int(length))
        if not 1 <= self.min <= self.opt <= self.max:
            raise InvalidRequestError(f"range {self} is not in order; expected 1 <= MIN <= OPT <= MAX")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @classmethod
    def fixed(cls, length: int) -> Self:
        """The range of one length."""
        return cls(length, length, length)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``MIN:OPT:MAX``, or one number for a fixed length.

        Raises:
            InvalidRequestError: for anything else.
        """
        match = _RANGE.fullmatch(text.strip())
        if not match:
            raise InvalidRequestError(f"{text!r} is no range of lengths; expected MIN:OPT:MAX such as 512:512:1024")
        if match[4]:
            return cls.fixed(int(match[4]))
        return cls(int(match[1]), int(match[2]), int(match[3]))

    def divided_by(self, factor: int) -> Self:
        """The range in units of ``factor``, e.g. from pixels to latents.

        Raises:
            InvalidRequestError: if a length is no multiple of ``factor``.
        """
        if any(length % factor for length in (self.min, self.opt, self.max)):
            raise InvalidRequestError(f"range {self} must consist of multiples of {factor}")
        return type(self)(self.min // factor, self.opt // factor, self.max // factor)


def parse_ranges(arguments: Iterable[str]) -> dict[str, Range]:
    """Read ``NAME=MIN:OPT:MAX`` arguments, e.g. ``height=512:512:1024``.

    Returns:
        Symbol -> range.

    Raises:
        InvalidRequestError: if an argument is malformed, out of order, or names a symbol again.
    """
    ranges: dict[str, Range] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        name = name.strip()
        if not equals or not name:
            raise InvalidRequestError(
                f"profile {argument!r} was not understood; expected NAME=MIN:OPT:MAX such as height=512:512:1024"
            )
        if name in ranges:
            raise InvalidRequestError(f"profile for {name!r} was given twice; give it once")
        try:
            ranges[name] = Range.parse(text)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"profile for {name!r}: {error}") from None
    return ranges


@dataclass(frozen=True)
class ShapeRange:
    """Shapes of one input.

    Attributes:
        min: Smallest shape.
        opt: Shape that the plan is tuned for.
        max: Largest shape.

    Raises:
        InvalidRequestError: unless all three have one rank, and whole numbers 1 <= min <= opt <= max in every
            dimension.
    """

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        ordered = len(self.min) == len(self.opt) == len(self.max) and all(
            all(map(is_integer, (low, usual, high))) and 1 <= low <= usual <= high
            for low, usual, high in zip(self.min, self.opt, self.max, strict=True)
        )
        if not ordered:
            raise InvalidRequestError(
                f"shapes {self.min}, {self.opt}, {self.max} are no profile; expected one rank, 1 <= min <= opt <= max"
            )


@dataclass(frozen=True)
class Profile:
    """Shapes of every dynamic input of a graph.

    Attributes:
        shapes: Input name -> its shapes.
    """

    shapes: Mapping[str, ShapeRange]

    @classmethod
    def of(cls, inputs: Iterable[TensorSpec], ranges: Mapping[str, Range]) -> Self:
        """Put ranges in place of the symbols in the inputs' shapes.

        Args:
            inputs: Specs of all inputs; those without a symbol need no entry and get none.
            ranges: Symbol -> range, in the units of the graph (for a U-Net, latents rather than pixels).
                Symbols that no input has are passed over, so that one set serves all components.

        Raises:
            InvalidRequestError: if a symbol has no range.
        """
        shapes = {}
        for spec in inputs:
            if not any(isinstance(length, str) for length in spec.shape):
                continue
            if missing := [length for length in spec.shape if isinstance(length, str) and length not in ranges]:
                raise InvalidRequestError(
                    f"input {spec} has no range for {missing[0]!r}; add {missing[0]}=MIN:OPT:MAX to the profile"
                )
            lengths = [Range.fixed(size) if isinstance(size, int) else ranges[size] for size in spec.shape]
            shapes[spec.name] = ShapeRange(
                tuple(length.min for length in lengths),
                tuple(length.opt for length in lengths),
                tuple(length.max for length in lengths),
            )
        return cls(shapes)

    def as_shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Input name -> (minimum, optimum, maximum) shape, as engine records and keys hold it."""
        return {name: (shape.min, shape.opt, shape.max) for name, shape in self.shapes.items()}
