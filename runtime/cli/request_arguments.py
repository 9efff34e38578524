"""Arguments of ``latentrt generate`` for the options of a request, made from their declarations."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from latentrt.engines.errors import InvalidRequestError

from ..request.control import Control
from ..request.kinds import Choice, Controls, Flag, Kind, Levels, Number, Pair, Side, Whole
from ..request.options import OPTIONS, Option
from ..vae.tiling import EDGES, Tiling


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare an argument for every option of a request that has one of its own, and those that describe tiles."""
    for name, option in OPTIONS.items():
        if option.flag:
            parser.add_argument(f"--{name.replace('_', '-')}", help=_help(option), **_form(option))
    parser.add_argument(
        "--vae-tile", type=int, metavar="PIXELS", help="decode larger images in tiles of this side, to save memory"
    )
    parser.add_argument(
        "--vae-tile-overlap",
        type=int,
        metavar="PIXELS",
        help="overlap of neighbouring tiles (default: a quarter of a tile)",
    )
    parser.add_argument(
        "--vae-tile-edges",
        choices=EDGES,
        help="move the last tile inwards, or make it smaller as diffusers does (default: shift)",
    )


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a request that were given on the command line.

    Raises:
        InvalidRequestError: if tiles are described without their size.
    """
    given = {name: getattr(arguments, name) for name, option in OPTIONS.items() if option.flag}
    tiling = _tiling(arguments.vae_tile, arguments.vae_tile_overlap, arguments.vae_tile_edges)
    return {name: value for name, value in {**given, "vae_tiling": tiling}.items() if value is not None}


def _help(option: Option) -> str:
    """The help text of an option; bounds and default are left out where they say nothing on a command line."""
    if isinstance(option.kind, Controls):
        return f"{option.help} (may be repeated)"
    return option.help if isinstance(option.kind, Flag) else option.summary


def _form(option: Option) -> dict[str, Any]:
    """How argparse reads an option's value; bounds are checked where every request is checked."""
    if isinstance(option.kind, Flag):
        return {"action": "store_const", "const": True}
    if isinstance(option.kind, Controls):
        return {"action": "append", "type": _control, "metavar": option.metavar}
    if isinstance(option.kind, Choice) and not option.kind.many:
        return {"choices": option.kind.words}
    return {"type": _reader(option.kind), "metavar": option.metavar}


def _reader(kind: Kind) -> Callable[[str], Any]:
    """The function that makes a value of a kind from a word of the command line."""
    if isinstance(kind, Whole | Side):
        return int
    if isinstance(kind, Number):
        return float
    if isinstance(kind, Levels):
        return _numbers
    if isinstance(kind, Pair):
        return lambda text: _pair(text, kind)
    return str


def _tiling(size: int | None, overlap: int | None, edges: str | None) -> Tiling | None:
    """Tiles that the command line describes, if it asks for any."""
    if size is None:
        if overlap is not None or edges is not None:
            raise InvalidRequestError("tiles are described but not asked for; give their size with --vae-tile")
        return None
    return Tiling(size, overlap, edges or "shift")


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; expected numbers between commas") from None


def _pair(text: str, kind: Pair) -> tuple[int, int]:
    """Two whole numbers, such as ``1024x768`` or ``0,64``."""
    first, _, second = text.partition(kind.between)
    if not (first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; expected {kind.example}")
    return int(first), int(second)


def _control(text: str) -> Control:
    """A ControlNet, its image, and up to three numbers behind colons."""
    name, equals, rest = text.partition("=")
    if not equals or not name or not rest:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; expected NAME=FILE")
    file, numbers = rest, list[float]()
    while len(numbers) < 3 and ":" in file:
        before, _, last = file.rpartition(":")
        try:
            numbers.insert(0, float(last))
        except ValueError:
            break  # a colon of the file's name
        file = before
    return Control(file, name, *numbers)
