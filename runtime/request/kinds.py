"""Kinds of values that a request's options have: what each accepts, and how it is shown and written."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from latentrt.engines.checks import check_choice, check_flag, check_integer, check_number, is_number, show
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import SAFETY_CHECKER, Manifest
from ..images.reading import PictureRecord
from ..vae.decoding import check_decoder
from ..vae.tiling import Tiling
from .control import Control


@dataclass(frozen=True)
class Limits:
    """The facts of a bundle that the bounds of some options depend on.

    Attributes:
        manifest: The bundle's.
        size_multiple: Pixels that width and height are multiples of.
    """

    manifest: Manifest
    size_multiple: int


class Kind(ABC):
    """A kind of values."""

    noun: ClassVar[str]
    """The manual's name for such a value."""

    @property
    def bounds(self) -> str:
        """The values that are allowed, for people; empty if the noun says all."""
        return ""

    @abstractmethod
    def check(self, name: str, value: Any, limits: Limits) -> Any:
        """The value as a :class:`~latentrt.runtime.request.request.Request` keeps it.

        Args:
            name: What messages call the option.
            value: What was received; not ``None`` unless the option's type excludes it.
            limits: What the bounds depend on.

        Raises:
            InvalidRequestError: naming what was received and what is expected.
        """

    def written(self, value: Any) -> object:
        """A checked value as the text of a PNG has it."""
        return value


class Text(Kind):
    """Any string."""

    noun = "a string"

    def check(self, name: str, value: Any, limits: Limits) -> str:
        """The string itself."""
        return check_text(name, value)


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number between two bounds, both included."""

    least: int
    most: int

    noun = "a whole number"

    @property
    def bounds(self) -> str:
        """Both bounds; a power of two is written as one."""
        exponent = (self.most + 1).bit_length() - 1
        power = exponent > 32 and self.most + 1 == 2**exponent
        return f"{self.least} to {f'2**{exponent} - 1' if power else self.most}"

    def check(self, name: str, value: Any, limits: Limits) -> int:
        """A Python ``int``."""
        return check_integer(name, value, self.least, self.most)


@dataclass(frozen=True)
class Side(Kind):
    """A width or a height in pixels: a multiple of what the model draws in.

    Attributes:
        most: The largest side.
    """

    most: int

    noun = "a whole number"

    @property
    def bounds(self) -> str:
        """The largest side; the smallest is the model's."""
        return f"a multiple of what the model draws in, up to {self.most}"

    def check(self, name: str, value: Any, limits: Limits) -> int:
        """A Python ``int``; a message about one between two multiples names both."""
        unit = limits.size_multiple
        pixels = check_integer(name, value, unit, self.most)
        if pixels % unit:
            below = pixels // unit * unit
            raise InvalidRequestError(
                f"{name} is {pixels}, expected a multiple of {unit}; the nearest are {below} and {below + unit}"
            )
        return pixels


@dataclass(frozen=True)
class Number(Kind):
    """A finite number between two bounds.

    Attributes:
        least: The lower bound, included.
        most: The upper bound, included.
        above: Whether the lower bound itself is excluded.
        hint: What a message about a wrong range adds.
    """

    least: float
    most: float
    above: bool = False
    hint: str = ""

    noun = "a number"

    @property
    def bounds(self) -> str:
        """Both bounds."""
        return f"above {self.least:g} and up to {self.most:g}" if self.above else f"{self.least:g} to {self.most:g}"

    def check(self, name: str, value: Any, limits: Limits) -> float:
        """A Python ``float``."""
        number = check_number(name, value, self.least, self.most, hint=self.hint)
        if self.above and number == self.least:
            raise InvalidRequestError(
                f"{name} is {show(value)}, expected more than {self.least:g}, up to {self.most:g}"
            )
        return number


class Fraction(Kind):
    """A part of a whole: more than nothing, and less than all."""

    noun = "a number"

    @property
    def bounds(self) -> str:
        """Both bounds, excluded."""
        return "between 0 and 1, both excluded"

    def check(self, name: str, value: Any, limits: Limits) -> float:
        """A Python ``float``."""
        if not is_number(value) or not 0 < value < 1:
            raise InvalidRequestError(f"{name} is {show(value)}, expected a number between 0 and 1, or nothing")
        return float(value)


class Flag(Kind):
    """True or false."""

    noun = "true or false"

    def check(self, name: str, value: Any, limits: Limits) -> bool:
        """A Python ``bool``."""
        return check_flag(name, value)


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words.

    Attributes:
        words: All that are known.
        many: Whether there are too many for a usage line.
    """

    words: tuple[str, ...]
    many: bool = False

    noun = "one of"

    @property
    def bounds(self) -> str:
        """All words."""
        return ", ".join(self.words)

    def check(self, name: str, value: Any, limits: Limits) -> str:
        """The word itself."""
        if self.many and (not isinstance(value, str) or value not in self.words):
            raise InvalidRequestError(f"unknown {name} {show(value)}; known {name}s: {self.bounds}")
        return check_choice(name, value, self.words)


class Decoder(Choice):
    """A decoder that the bundle has."""

    def check(self, name: str, value: Any, limits: Limits) -> str:
        """The word itself."""
        return check_decoder(limits.manifest, value)


class Safety(Choice):
    """The fate of unsafe images; the first word needs no safety checker in the bundle."""

    def check(self, name: str, value: Any, limits: Limits) -> str:
        """The word itself."""
        word = super().check(name, value, limits)
        if word != self.words[0] and SAFETY_CHECKER not in limits.manifest.components:
            raise InvalidRequestError(
                f"{name} is {word!r}, but the bundle has no safety checker; build it again with --safety-checker DIR"
            )
        return word


def _is_listed(value: object) -> bool:
    """Whether a value is a sequence, or an array of one dimension; texts are none."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


@dataclass(frozen=True)
class Pair(Kind):
    """Two whole numbers: across and down, in pixels.

    Attributes:
        least: The lower bound of both, included.
        most: The upper bound of both, included.
        between: What stands between them in a text.
        example: A pair as the command line takes it.
    """

    least: int
    most: int
    between: str
    example: str

    noun = "two whole numbers"

    @property
    def bounds(self) -> str:
        """Both bounds."""
        return f"{self.least} to {self.most}"

    def check(self, name: str, value: Any, limits: Limits) -> tuple[int, int]:
        """A tuple of two Python ``int``."""
        if not _is_listed(value) or len(value) != 2:
            raise InvalidRequestError(f"{name} is {show(value)}, expected two whole numbers, across and down")
        across, down = (check_integer(name, each, self.least, self.most) for each in value)
        return across, down

    def written(self, value: Any) -> object:
        """Such as ``1024x768`` of a size, and ``0 64`` of a place."""
        return ("x" if self.between == "x" else " ").join(f"{each:g}" for each in value)


@dataclass(frozen=True)
class Levels(Kind):
    """Timesteps or noise levels; their order and range are for the sampler to check.

    Attributes:
        most: How many there may be.
    """

    most: int

    noun = "a sequence of numbers"

    @property
    def bounds(self) -> str:
        """The number of entries that it may have."""
        return f"1 to {self.most} entries"

    def check(self, name: str, value: Any, limits: Limits) -> tuple[float, ...]:
        """A tuple of Python ``float``."""
        if not _is_listed(value):
            raise InvalidRequestError(f"{name} is {show(value)}, expected a sequence of numbers")
        if not 1 <= len(value) <= self.most:
            raise InvalidRequestError(f"{name} has {len(value)} entries, expected 1 to {self.most}")
        try:
            levels = tuple(float(each) for each in value)
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequestError(f"{name} is {show(value)}, expected a sequence of numbers") from None
        if not all(map(math.isfinite, levels)):
            raise InvalidRequestError(f"{name} is {show(value)}, expected finite numbers")
        return levels

    def written(self, value: Any) -> object:
        """Numbers between spaces."""
        return " ".join(f"{each:g}" for each in value)


class InputImage(Kind):
    """An image that a caller gives; a request keeps a record of it."""

    noun = "an image"

    def check(self, name: str, value: Any, limits: Limits) -> PictureRecord:
        """The record, which was made when the image was read."""
        if not isinstance(value, PictureRecord):
            raise InvalidRequestError(
                f"{name} is a {type(value).__name__}, expected the record of an image that was read"
            )
        return value

    def written(self, value: Any) -> object:
        """The file's name if there is one, and the beginning of the hash."""
        return f"{value.path or 'given'} {value.sha256[:12]}"


class Controls(Kind):
    """ControlNets with their images, which were checked when the images were read."""

    noun = "a list of `Control`"

    def check(self, name: str, value: Any, limits: Limits) -> tuple[Control, ...]:
        """A tuple of the same."""
        if not _is_listed(value) or not all(isinstance(each, Control) for each in value):
            raise InvalidRequestError(f"{name} is {show(value)}, expected a list of Control")
        return tuple(value)


class Tiles(Kind):
    """Tiles for the autoencoder, or the side of one in pixels, or whether there are any."""

    noun = "a `Tiling`, a tile's side in pixels, or true or false"

    def check(self, name: str, value: Any, limits: Limits) -> Tiling | None:
        """A :class:`Tiling` with its overlap filled in; ``None`` if there are no tiles."""
        if value is False:
            return None
        if not isinstance(value, Tiling):
            value = Tiling() if value is True else Tiling(value)
        fitted: Tiling = value.fitted(limits.manifest.latent.vae_scale_factor)
        return fitted

    def written(self, value: Any) -> object:
        """Such as ``512 overlap 128 shift``."""
        return f"{value.size} overlap {value.overlap} {value.edges}"


def check_text(name: str, value: Any) -> str:
    """A string.

    Raises:
        InvalidRequestError: if it is none.
    """
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} is a {type(value).__name__}, expected a string")
    return value
