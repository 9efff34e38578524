"""Output of the commands: bars on a terminal, quiet otherwise; JSON where asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]


def print_json(value: Any) -> None:
    """Print a value as one JSON document on standard output, in ASCII, which every terminal and pipe takes."""
    print(json.dumps(value, indent=2))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned with spaces; the widest cell decides."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def size(count: float) -> str:
    """Bytes in decimal units, e.g. ``43.7 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def seconds(value: float) -> str:
    """A duration, e.g. ``12.3 ms`` or ``4.56 s``."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def bar(total: int, label: str, unit: str) -> tqdm[Any]:
    """A progress bar on standard error; invisible where that is no terminal."""
    return tqdm(total=total, desc=label, unit=unit, disable=not sys.stderr.isatty(), leave=False, file=sys.stderr)


class BuildConsole:
    """Shows the events of a build: a line for each piece of work, and a bar while a plan is being built.

    Args:
        quiet: Show nothing, as with ``--json``.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._text = ""

    def stage(self, text: str) -> None:
        """A new piece of work begins."""
        self._text = text
        if not self._quiet and sys.stderr.isatty():
            print(f"  {text} ...", end="\r", file=sys.stderr, flush=True)

    def progress(self, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of a phase are finished."""
        if self._quiet:
            return
        if self._bar is None:
            self._bar = bar(total, self._text, "")
            self._bar.bar_format = "{desc} |{bar:30}| {percentage:3.0f}% {postfix}"
        self._bar.set_postfix_str(phase[:40], refresh=False)
        self._bar.update(done - self._bar.n)

    def result(self, text: str) -> None:
        """The current piece of work is finished."""
        self.close()
        if not self._quiet:
            print(f"{self._text}: {text}".ljust(60), flush=True)

    def close(self) -> None:
        """Remove the bar, if one is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
