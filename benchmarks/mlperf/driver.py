"""The load generator's process, as the process with the pipeline sees it."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from latentrt.engines.errors import EngineError

_PATIENCE = 10.0  # seconds that loadgen's process may take to end after its test


class LoadgenProcess:
    """Loadgen in a process of its own. A context manager: leaving it ends the process, whatever state it is in."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        # -P: modules in the file's folder must not hide those of the standard library.
        command = [sys.executable, "-P", str(Path(__file__).with_name("process.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8"
        )
        # A thread always reads at once: loadgen would issue the next query late while it cannot pass one on.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if error is not None:
                self._process.kill()
            with contextlib.suppress(BrokenPipeError):  # the process has ended, and something was left to write
                self._process.stdin.close()
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # the logs are complete; only the process is not
            pass
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()
            self._errors.close()

    def begin(self, job: Mapping[str, Any]) -> None:
        """Begin the process's only test; :func:`latentrt.benchmarks.mlperf.process.main` describes the job."""
        self._send(job)

    def due(self, *, wait: bool) -> list[tuple[int, int]] | None:
        """Queries since the last call, as number and index of the prompt; ``None`` when the test is over.

        Args:
            wait: Whether to wait for a query where there is none.

        Raises:
            EngineError: if the process ended before its test.
        """
        found: list[tuple[int, int]] = []
        while wait or not self._messages.empty():
            message = self._messages.get()
            if message is None:
                raise self._failure()
            if "over" in message:
                return None
            found += [(number, index) for number, index in message["queries"]]
            wait = False
        return found

    def complete(self, number: int) -> None:
        """Report that a query was answered."""
        self._send({"done": [number]})

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # the last line of a process that was killed may be cut off
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _failure(self) -> EngineError:
        try:
            status = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it runs on, but has closed its output
            self._process.kill()
            status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return EngineError(f"loadgen ended with status {status} before its test was over: {said[:300]}")
