"""Optimisation profiles: reading, order, symbols."""

from __future__ import annotations

import pytest

from latentrt.engines import TensorSpec
from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.trt import Profile, Range, ShapeRange, parse_ranges

UNET = [
    TensorSpec("sample", "float16", ("batch", 4, "height", "width")),
    TensorSpec("timestep", "float16", ("batch",)),
    TensorSpec("constant", "float16", (1, 77)),
]


def test_ranges_are_read() -> None:
    """MIN:OPT:MAX is a range, and a single number a fixed length."""
    ranges = parse_ranges(["height=512:768:1024", " batch = 1:1:4 ", "width=512"])
    assert ranges == {"height": Range(512, 768, 1024), "batch": Range(1, 1, 4), "width": Range(512, 512, 512)}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("height", "'height' was not understood; expected NAME=MIN:OPT:MAX"),
        ("=1:2:3", "was not understood"),
        ("height=", "'height': '' is no range"),
        ("height=1:2", "'1:2' is no range"),
        ("height=1:2:3:4", "is no range"),
        ("height=a:b:c", "is no range"),
        ("height=-1:2:3", "is no range"),
        ("height=1:2:9999999999", "is no range"),
        ("height=512:256:1024", "512:256:1024 is not in order; expected 1 <= MIN <= OPT <= MAX"),
        ("height=512:1024:768", "not in order"),
        ("height=0:1:2", "not in order"),
    ],
)
def test_malformed_ranges_are_named(argument: str, message: str) -> None:
    """An argument that is no range is refused in a sentence that quotes it."""
    with pytest.raises(InvalidRequestError, match=message):
        parse_ranges([argument])


def test_range_given_twice() -> None:
    """A symbol may be given once only."""
    with pytest.raises(InvalidRequestError, match="'height' was given twice"):
        parse_ranges(["height=1:1:1", "height=2:2:2"])


def test_division_into_latents() -> None:
    """Pixels become latents, and what is no multiple is refused."""
    assert Range(512, 768, 1024).divided_by(8) == Range(64, 96, 128)
    with pytest.raises(InvalidRequestError, match="512:513:1024 must consist of multiples of 8"):
        Range(512, 513, 1024).divided_by(8)


def test_profile_puts_ranges_in_place_of_symbols() -> None:
    """Every dynamic input gets its three shapes; a static one gets none, and unused ranges do no harm."""
    ranges = parse_ranges(["batch=1:2:8", "height=32:64:128", "width=64", "unused=1:1:1"])
    profile = Profile.of(UNET, ranges)
    assert profile.as_shapes() == {
        "sample": ((1, 4, 32, 64), (2, 4, 64, 64), (8, 4, 128, 64)),
        "timestep": ((1,), (2,), (8,)),
    }


def test_symbol_without_range() -> None:
    """A symbol that has no range is named, with the argument that would give it one."""
    with pytest.raises(InvalidRequestError, match=r"no range for 'height'; add height=MIN:OPT:MAX"):
        Profile.of(UNET, parse_ranges(["batch=1:1:1"]))


@pytest.mark.parametrize("shapes", [((1, 2), (1,), (1, 2)), ((2,), (1,), (3,)), ((0,), (1,), (1,))])
def test_shape_ranges_are_checked(shapes: tuple[tuple[int, ...], ...]) -> None:
    """Shapes of different ranks or out of order are refused."""
    with pytest.raises(InvalidRequestError, match="are no profile"):
        ShapeRange(*shapes)
