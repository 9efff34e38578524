"""Command-line options that name the files of adapters: those that each kind declares."""

from __future__ import annotations

import argparse

from latentrt.engines.errors import InvalidRequestError

from ..adapters.base import AdapterFiles
from ..adapters.registry import ADAPTERS


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Declare the options of all kinds of adapter."""
    for kind in ADAPTERS:
        for option in kind.options:
            # A default that is a list is not changed by argparse: it appends to a copy.
            parser.add_argument(option.flag, action="append", default=[], metavar=option.metavar, help=option.help)


def adapters_of(arguments: argparse.Namespace) -> tuple[AdapterFiles, ...]:
    """Files of the adapters that a command line names.

    Raises:
        InvalidRequestError: if a value cannot be understood, or an option is given twice that is not repeated.
    """
    found = []
    for kind in ADAPTERS:
        values = {option.name: tuple(getattr(arguments, option.name)) for option in kind.options}
        for option in kind.options:
            if len(values[option.name]) > 1 and not option.repeated:
                raise InvalidRequestError(f"{option.flag} is given {len(values[option.name])} times; give it once")
        if (files := kind.parse(values)) is not None:
            found.append(files)
    return tuple(found)
