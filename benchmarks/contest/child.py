"""The process of one contender: requests, answers, and the ways in which it can fail."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from latentrt.engines.errors import LatentRTError

from ..peers import launch
from ..peers.wire import MEMORY, UNSUPPORTED

_GRACE = 5.0  # seconds that a process has to end by itself
_LONGEST_ANSWER = 16 << 20


class ContenderError(LatentRTError):
    """A contender did not serve a request; the message is its own, or says how its process ended.

    Attributes:
        unsupported: Whether its library does not support the request, or it cannot run here.
        gone: Whether its process has ended.
    """

    def __init__(self, message: str, *, unsupported: bool = False, gone: bool = False) -> None:
        super().__init__(message)
        self.unsupported = unsupported
        self.gone = gone


class Child:
    """The running program of a contender. A context manager: leaving it ends the process.

    Args:
        command: The command that starts the program.
        log: File for the output of the program and its libraries.
        timeout: Seconds that an answer may take.
    """

    def __init__(self, command: Sequence[str], log: Path, timeout: float) -> None:
        self.started = time.perf_counter()
        self._log, self._timeout = log, timeout
        with log.open("ab") as file:
            # In a group of its own, Ctrl-C in the terminal reaches the harness alone, which decides who ends when.
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True
            )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Identifier of the process."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            ContenderError: if the program refuses, fails, ends, or takes too long (it is ended then).
        """
        assert self._process.stdin is not None, "it is a pipe"
        with contextlib.suppress(BrokenPipeError):  # the program has ended, so there will be no answer either
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            self.end(grace=0)
            raise ContenderError(f"gave no answer within {self._timeout:.0f} s and was ended", gone=True) from None
        if not line:
            raise ContenderError(self._epitaph(), gone=True)
        try:
            answer: dict[str, Any] = json.loads(line)
            done = answer["ok"]
        except (ValueError, KeyError, TypeError):
            self.end(grace=0)
            raise ContenderError(f"answered with something else than JSON: {line[:80]!r}", gone=True) from None
        if not done:
            message = f"out of memory: {answer['error']}" if answer["kind"] == MEMORY else str(answer["error"])
            raise ContenderError(message, unsupported=answer["kind"] == UNSUPPORTED)
        return answer

    def end(self, grace: float = _GRACE) -> None:
        """End the process: close its input, then use force. A second call does nothing.

        Args:
            grace: Seconds that the process has to end by itself.
        """
        assert self._process.stdin is not None, "it is a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, _GRACE)):
            try:
                self._process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
        self._process.wait()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _read(self) -> None:
        assert self._process.stdout is not None, "it is a pipe"
        while line := self._process.stdout.readline(_LONGEST_ANSWER):
            self._answers.put(line)
        self._answers.put(b"")
        self._process.stdout.close()

    def _epitaph(self) -> str:
        """How the process ended, with the last line that it printed."""
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.end()
            code = self._process.wait()
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"its process {how}; its last line was: {_last_line(self._log)}"


def own_command() -> list[str]:
    """The command of LatentRT's own worker."""
    return [sys.executable, "-m", "latentrt.benchmarks.contest.worker"]


def peer_command(python: Path, program: str) -> list[str]:
    """The command of a peer's program in its environment."""
    return [str(python), str(Path(launch.__file__).resolve()), program]


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return last if len(last) <= 300 else f"{last[:300]}..."
