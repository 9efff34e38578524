"""A fake peer that misbehaves as libraries do, and its program from the harness's side."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.peers import wire

PEERS = Path(wire.__file__).parent


class Child:
    """A contender's program, from the harness's side."""

    def __init__(self, folder: Path, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "launch.py"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture(scope="module")
def fake_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peers' folder with a fake peer in it."""
    folder = tmp_path_factory.mktemp("peers")
    for name in ("__init__", "launch", "wire", "conversion", "checkpoints", "keeping"):
        shutil.copy(PEERS / f"{name}.py", folder)
    shutil.copy(Path(__file__).with_name("fake_peer.py"), folder)
    return folder


@pytest.fixture
def child(fake_folder: Path, start_peer: Callable[[Path, str], Child]) -> Child:
    """The fake contender, running."""
    return start_peer(fake_folder, "fake_peer")


@pytest.fixture
def start_peer() -> Iterator[Callable[[Path, str], Child]]:
    """Starts a peer's program, given its folder and name; it is ended after the test."""
    started = []

    def start(folder: Path, name: str) -> Child:
        started.append(Child(folder, name))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def peer_job() -> dict[str, Any]:
    """A job as a contender's program reads it, but for the paths."""
    return {
        "bundle": None,
        "prompt": "a red apple",
        "negative_prompt": "a green leaf",
        "seed": 7,
        "steps": 2,
        "sampler": "euler",
        "guidance": 4.0,
        "width": 32,
        "height": 32,
        "images": 1,
        "threads": 1,
        "device": "cpu",
        "options": {},
    }
