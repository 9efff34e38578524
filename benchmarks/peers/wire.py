"""What a contender's program and the harness say to each other: one JSON object a line.

The program answers on what was its standard output when it began. Libraries print there too, so the descriptor is kept
aside and what they print goes to standard error. Standard library only: this runs in environments without LatentRT.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol, TextIO

UNSUPPORTED, FAILED, MEMORY = "unsupported", "failed", "memory"
"""Kinds of failure: the library cannot do it; it should have, and did not; it ran out of memory."""

# PyTorch on a CPU, ONNX Runtime, and what C++ and the system say.
_NO_MEMORY = (
    "can't allocate memory",
    "failed to allocate memory",
    "bad_alloc",
    "cannot allocate memory",
    "out of memory",
)


class UnsupportedError(Exception):
    """The library cannot do what the job asks for; the message is one sentence."""


class Contender(Protocol):
    """What is measured.

    ``open`` and ``draw`` return what the harness is told, see ``docs/how-to/benchmark.md``; both raise
    :class:`UnsupportedError` for what the library has not got.
    """

    def open(self, job: dict[str, Any]) -> dict[str, Any]:
        """Import the library and load the model; seconds of each are in the answer."""

    def draw(self, request: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        """Draw the job's pictures; seconds of each stage are in the answer."""

    def close(self) -> None:
        """Let go of the model."""


def serve(make: Callable[[], Contender]) -> int:
    """Answer requests from standard input until it ends or ``close`` comes; returns the exit status.

    An interrupt from the terminal reaches every process of its group: it is the harness that decides what ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    requests = os.fdopen(os.dup(0), encoding="utf-8")  # what a library starts must not read them
    with open(os.devnull, encoding="ascii") as nothing:
        os.dup2(nothing.fileno(), 0)
    contender, job = make(), {}
    for line in requests:
        request = json.loads(line)
        try:
            if request["do"] == "open":
                job = request["job"]
                answer = contender.open(job)
            elif request["do"] == "draw":
                answer = contender.draw(request, job)
            else:
                contender.close()
                _say(answers, {"ok": True})
                return 0
            _say(answers, {"ok": True, **answer})
        except UnsupportedError as error:
            _say(answers, {"ok": False, "kind": UNSUPPORTED, "error": sentence(error)})
        except Exception as error:  # noqa: BLE001 - whatever a library raises is this contender's result
            traceback.print_exc()
            kind = MEMORY if _lacks_memory(error) else FAILED
            _say(answers, {"ok": False, "kind": kind, "error": sentence(error)})
    return 0


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak is all there is
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Most memory of this process that was resident at a time."""
    # Linux starts ru_maxrss of a new program at the peak of the process that started it; VmHWM is this program's own.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    known = {"device_peak_bytes": None, **answer}
    known |= {"rss_bytes": resident_bytes(), "peak_rss_bytes": peak_resident_bytes()}
    answers.write(json.dumps(known) + "\n")
    answers.flush()


def _lacks_memory(error: BaseException) -> bool:
    """Whether memory is what a library ran out of; most say so in a RuntimeError of their own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's, on a GPU
        return True
    text = str(error).lower()
    return any(phrase in text for phrase in _NO_MEMORY)


def sentence(error: BaseException) -> str:
    """The error in one line of a bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    named = text if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {text}"
    return named if len(named) <= 400 else f"{named[:400]}..."
