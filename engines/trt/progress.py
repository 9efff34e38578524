"""Progress of a build that is reported to a callback, and Ctrl-C that stops the build."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""``on_progress(phase, done, total)``: the SDK's phase, and how much of the *whole* build is done.

``done`` never decreases and is at most ``total``. An exception that it raises stops the build and reaches the caller.
"""

TOTAL = 1000
"""The ``total`` of every call: progress is reported in thousandths."""


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildMonitor:
    """Turns the SDK's nested phases into one number, and stops the build on demand.

    The SDK reports phases that lie within a step of their parent; their share of it counts as done. It swallows what
    a monitor raises, so nothing is raised inside its calls: an exception is kept for :meth:`check`.

    Attributes:
        handle: The object that the SDK takes as its progress monitor.
    """

    def __init__(self, module: Any, on_progress: Progress | None) -> None:
        self._on_progress = on_progress
        self._phases: dict[str, _Phase] = {}
        self._reported = 0
        self._error: BaseException | None = None
        self._lock = threading.RLock()
        monitor = self

        class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the base is only known at run time
            def __init__(self) -> None:
                module.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                monitor._update(phase_name, lambda: monitor._start(phase_name, parent_phase, num_steps))

            def phase_finish(self, phase_name: str) -> None:
                monitor._update(phase_name, lambda: monitor._finish(phase_name))

            def step_complete(self, phase_name: str, step: int) -> bool:
                return monitor._update(phase_name, lambda: monitor._step(phase_name, step))

        self.handle = Monitor()

    def stop(self, error: BaseException) -> None:
        """Stop the build at its next step; :meth:`check` then raises ``error``. The first error wins."""
        if self._error is None:
            self._error = error

    def check(self) -> None:
        """Raise the exception that stopped the build, if one did."""
        if self._error is not None:
            raise self._error

    def report(self, phase: str, done: int) -> None:
        """Report ``done`` thousandths to the callback, or more if more were reported before."""
        self._reported = max(self._reported, min(done, TOTAL))
        if self._on_progress is not None and self._error is None:
            self._on_progress(phase, self._reported, TOTAL)

    def _update(self, phase: str, change: Callable[[], None]) -> bool:
        try:
            with self._lock:  # the SDK may call from several threads
                change()
                self.report(phase, min(TOTAL - 1, round(TOTAL * self._fraction())))  # the plan is still to be written
        except BaseException as error:  # noqa: BLE001  # raised again by check(), outside of the SDK
            self.stop(error)
        return self._error is None

    def _start(self, name: str, parent: str | None, steps: int) -> None:
        known = parent if parent in self._phases and parent != name else None
        self._phases[name] = _Phase(known, max(steps, 1))

    def _step(self, name: str, step: int) -> None:
        if phase := self._phases.get(name):
            phase.done = max(phase.done, step + 1)

    def _finish(self, name: str) -> None:
        phase = self._phases.pop(name, None)
        if phase is not None and phase.parent is None:
            self._reported = TOTAL - 1

    def _fraction(self, parent: str | None = None) -> float:
        """Part done of the phases in progress below ``parent``, at most 1."""
        return min(
            1.0,
            sum(
                min(1.0, (phase.done + self._fraction(name)) / phase.steps)
                for name, phase in list(self._phases.items())
                if phase.parent == parent
            ),
        )


@contextlib.contextmanager
def interrupt_stops(monitor: BuildMonitor) -> Iterator[None]:
    """Let Ctrl-C stop the build, rather than raise in the middle of whatever Python code runs at that moment.

    Elsewhere than in the main thread, or where the application handles SIGINT itself, nothing is changed.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        monitor.stop(KeyboardInterrupt())

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
