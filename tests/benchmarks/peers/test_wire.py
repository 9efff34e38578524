"""The protocol of contenders' programs, which ``launch`` starts: answers, errors, memory and interrupts."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.peers import wire


def test_what_libraries_print_and_read_is_not_on_the_wire(child: Any, fake_folder: Path) -> None:
    """Answers are alone on standard output, requests are read by nobody else, and ``close`` ends the program."""
    answer = child.ask("open", job={"say": "ä"})
    assert answer["ok"] is True
    assert answer["notes"][0] == "ä"
    assert Path(answer["notes"][1]) != fake_folder
    assert answer["peak_rss_bytes"] >= answer["rss_bytes"] > 1 << 20
    assert answer["device_peak_bytes"] is None
    assert child.ask("close")["ok"] is True
    output, error = child.process.communicate(timeout=30)
    assert (output, child.process.returncode) == ("", 0)
    assert "library says hello" in error
    assert "so does its program" in error


@pytest.mark.parametrize(
    ("picture", "kind", "message"),
    [
        ("unsupported", "unsupported", "it cannot do this"),
        ("memory", "memory", "MemoryError: MemoryError"),
        ("device memory", "memory", "OutOfMemoryError: CUDA ran out"),
        ("allocator", "memory", "RuntimeError: DefaultCPUAllocator: can't allocate memory"),
        ("anything", "failed", "ValueError: a message of two lines"),
    ],
)
def test_an_error_is_an_answer(
    picture: str,
    kind: str,
    message: str,
    fake_folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a draw raises is answered in one sentence, by kind, and the contender goes on serving."""
    requests = "".join(json.dumps({"do": "draw", "picture": each}) + "\n" for each in (picture, "anything"))
    namespace: dict[str, Any] = {"__package__": wire.__package__, "__name__": f"{wire.__package__}.fake_peer"}
    exec((fake_folder / "fake_peer.py").read_text(), namespace)
    read, write = os.pipe()
    os.write(write, requests.encode())
    os.close(write)
    kept = [os.dup(descriptor) for descriptor in (0, 1)]
    interrupt = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    try:
        os.dup2(read, 0)
        assert wire.serve(namespace["Contender"]) == 0, "it ends where requests do"
    finally:
        os.dup2(kept[0], 0)
        os.dup2(kept[1], 1)
        signal.signal(signal.SIGINT, interrupt)
        for descriptor in (read, *kept):
            os.close(descriptor)
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [answer["ok"] for answer in answers] == [False, False]
    assert answers[0]["kind"] == kind
    assert answers[0]["error"].startswith(message)
    assert answers[1]["error"] == "ValueError: a message of two lines"


def test_the_programs_memory_is_its_own(child: Any) -> None:
    """The peak does not begin at that of the process that started the program, and follows what it takes."""
    ballast = b"x" * (256 << 20)
    before = child.ask("open", job={"say": ""})["peak_rss_bytes"]
    assert before < len(ballast)
    after = child.ask("draw", picture="hog")
    assert after["total"] == 64 << 20
    assert after["peak_rss_bytes"] - before >= 64 << 20
    del ballast


def test_an_interrupt_is_left_to_the_harness(child: Any) -> None:
    """A Ctrl-C does not end a contender; the end of its input does, with status 0."""
    child.ask("open", job={"say": ""})
    child.process.send_signal(signal.SIGINT)
    assert child.ask("draw", picture="anything")["kind"] == "failed"
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(timeout=30) == 0
