"""Parts that the measuring programs share: their parser, types of arguments, and their report as a JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentrt.engines.checks import check_integer
from latentrt.engines.errors import InvalidRequestError


def make_parser(module: str, documentation: str | None, *, json_file: bool = True) -> argparse.ArgumentParser:
    """A parser for a program that runs as ``python -m``.

    Args:
        module: The program's module below ``latentrt.benchmarks``, such as ``"studies.winograd"``.
        documentation: The module's docstring; its first line describes the program.
        json_file: Whether to add ``--json FILE``; pass the option's value to :func:`write_json`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m latentrt.benchmarks.{module}", description=(documentation or "").split("\n")[0]
    )
    if json_file:
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to this file too")
    return parser


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of argument for argparse: a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            value: int | str = int(text)
        except ValueError:
            value = text
        try:
            return check_integer("the value", value, least, most)
        except InvalidRequestError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write a report to a file, if one is named.

    Raises:
        OSError: if the file cannot be written.
    """
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
