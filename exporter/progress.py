"""Progress of a build, as its caller receives it."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the events of a build; a terminal draws them, a service may log them."""

    def stage(self, text: str) -> None:
        """A new piece of work begins."""
        ...

    def progress(self, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of a phase of the current piece are finished."""
        ...

    def result(self, text: str) -> None:
        """The current piece of work is finished; ``text`` is its outcome."""
        ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """Say nothing."""

    def result(self, text: str) -> None:
        """Say nothing."""
