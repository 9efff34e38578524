"""Conversions of a checkpoint: made once, in a process that ends with its parent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentrt.benchmarks.peers import keeping


def test_a_conversion_is_made_once(child: Any, tmp_path: Path) -> None:
    """It is kept in the workspace, made again when the checkpoint changes, and its failure is an answer."""
    source = tmp_path / "source"
    source.mkdir()
    job = {"source": str(source), "workspace": str(tmp_path / "workspace")}
    assert child.ask("open", job=job)["error"] == "RuntimeError: converting the checkpoint failed: ValueError: no model"
    (source / "model").write_text("first")
    first = child.ask("open", job=job)
    assert first["ok"] is True
    assert first["prepare_seconds"] > 0
    assert first["notes"] == ["it was adapted"]
    again = child.ask("open", job=job)
    assert (again["prepare_seconds"], again["notes"]) == (None, ["it was adapted"])
    (source / "model").write_text("the second")
    assert child.ask("open", job=job)["prepare_seconds"] > 0


def test_a_conversion_ends_with_the_program(
    fake_folder: Path, start_peer: Callable[[Path, str], Any], tmp_path: Path
) -> None:
    """Killing the program that waits for a conversion leaves no process that converts."""
    slow = (fake_folder / "fake_peer.py").read_text().replace("(target /", "import time; time.sleep(600); (target /")
    (fake_folder / "slow_peer.py").write_text(slow.replace('converted("fake_peer"', 'converted("slow_peer"'))
    source = tmp_path / "source"
    source.mkdir()
    (source / "model").touch()
    child = start_peer(fake_folder, "slow_peer")
    assert child.process.stdin is not None
    job = {"source": str(source), "workspace": str(tmp_path)}
    child.process.stdin.write(json.dumps({"do": "open", "job": job}) + "\n")
    child.process.stdin.flush()
    assert child.process.stderr is not None
    assert child.process.stderr.readline() == "an exporter says hello\n", "it converts"
    child.process.kill()
    assert child.process.stderr.read() == "", "nobody holds standard error any more"
    assert not list(tmp_path.glob("slow-peer-*/" + keeping.MARKER))
