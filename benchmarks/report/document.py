"""Reading, checking and writing a report as JSON.

``schema.json`` beside this module (JSON Schema 2020-12) says what a report holds and in which units. The report of a
run that ended early is valid too: it says what is missing.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from latentrt.engines.errors import LatentRTError, OutputError
from latentrt.runtime.images.png import check_target

from .types import Report

SCHEMA: Final = "latentrt-bench/1"
"""Name and version of the format; the value of a report's ``schema``."""

MAX_BYTES = 32 << 20
"""Largest report that is read: a hundred contenders with a hundred rounds of a hundred steps take a fifth of it."""


class ReportError(LatentRTError, ValueError):
    """A file or a document is no report of a benchmark, or lacks what the caller needs of it."""


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a report."""
    text = files(__package__).joinpath("schema.json").read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(text))


def validate(report: object) -> Report:
    """Check that a document is a report.

    Beyond the schema, numbers must be finite, the names of contenders distinct, and the reference one of them.

    Returns:
        The same document.

    Raises:
        ReportError: if it is no report; the message names the place.
    """
    try:
        error = best_match(Draft202012Validator(schema()).iter_errors(report))
        infinite = _not_finite(report, ())
    except RecursionError:
        raise ReportError("it is nested too deeply") from None
    if error is not None:
        message = error.message if len(error.message) <= 200 else f"{error.message[:200]}..."
        raise ReportError(f"{_place(error.absolute_path)}: {message}")
    if infinite is not None:
        raise ReportError(f"{_place(infinite)}: the number is not finite")
    checked = cast(Report, report)
    names = [contender["name"] for contender in checked["contenders"]]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ReportError(f"contenders: {min(twice)!r} is there twice, expected each name once")
    reference = checked["reference"]
    if reference is not None and reference["contender"] not in names:
        raise ReportError(f"reference: {reference['contender']!r} is none of the contenders")
    return checked


def read(path: str | os.PathLike[str]) -> Report:
    """Read a report.

    Raises:
        ReportError: if the file cannot be read, is too large, is not JSON, or is no report.
    """
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ReportError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_BYTES:
        raise ReportError(f"{name} is larger than {MAX_BYTES >> 20} MiB, expected a report of latentrt bench")
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
    except ReportError as error:
        raise ReportError(f"{name} is not valid JSON: {error}") from None
    except RecursionError:
        raise ReportError(f"{name} is nested too deeply, expected a report of latentrt bench") from None
    except ValueError as error:  # bad syntax, bytes that are no text, a number of thousands of digits
        raise ReportError(f"{name} is not valid JSON: {str(error)[:200]}") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        what = f"its schema is {str(found)[:40]!r}" if found is not None else "it names no schema"
        raise ReportError(f"{name} is no report of latentrt bench: {what}, expected {SCHEMA!r}")
    try:
        return validate(document)
    except ReportError as error:
        raise ReportError(f"{name} is no sound report of latentrt bench: {error}") from error


def to_json(report: Report) -> str:
    """The report as JSON text in ASCII that ends in a line break; each list of numbers takes one line.

    Raises:
        ReportError: if :func:`validate` refuses it.
    """
    return _layout(validate(report), 0) + "\n"


def write(path: str | os.PathLike[str], report: Report) -> None:
    """Write a report whole or not at all.

    Raises:
        ReportError: if :func:`validate` refuses it.
        OutputError: if the file cannot be written; an older one stays unchanged.
    """
    write_text(path, to_json(report))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all: to a temporary file beside it, to the disk, and only then under its name.

    Raises:
        OutputError: if the file cannot be written; an older one stays unchanged, and nothing else is left behind.
    """
    target = check_target(Path(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(text.encode(errors="replace"))  # a lone surrogate in a prompt is no reason to lose a report
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"cannot write {path}: {reason}; free some space or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _refuse_constant(name: str) -> NoReturn:
    raise ReportError(f"{name} is no number in JSON")


def _place(path: Any) -> str:
    """A path within a document as text, such as ``contenders[2].summary.total``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return text or "the document"


def _not_finite(value: object, path: tuple[str | int, ...]) -> tuple[str | int, ...] | None:
    """Path of the first number that is not finite: ``1e999`` is valid JSON."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    children: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return next((found for key, child in children if (found := _not_finite(child, (*path, key))) is not None), None)


def _layout(value: object, indent: int) -> str:
    """JSON with a line for each member and one for each list of plain values; samples would fill thousands."""
    pad = " " * (indent + 1)
    if isinstance(value, Mapping) and value:
        members = [f"{pad}{json.dumps(key)}: {_layout(member, indent + 1)}" for key, member in value.items()]
        return "{\n" + ",\n".join(members) + f"\n{' ' * indent}}}"
    if isinstance(value, list) and any(isinstance(each, (list, Mapping)) for each in value):
        return "[\n" + ",\n".join(pad + _layout(each, indent + 1) for each in value) + f"\n{' ' * indent}]"
    return json.dumps(value, allow_nan=False)
