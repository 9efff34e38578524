"""A contender's process, and answers that are none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from latentrt.benchmarks.contest.child import Child, ContenderError


def test_an_answer_that_is_no_json_ends_the_process(tmp_path: Path) -> None:
    """What it said is quoted."""
    command = [sys.executable, "-c", "input(); print('what?', flush=True); input()"]
    with (
        Child(command, tmp_path / "log", 5) as child,
        pytest.raises(ContenderError, match=r"answered with something else than JSON: b'what\?"),
    ):
        child.ask({"do": "open"})
