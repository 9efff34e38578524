"""Folders that are made once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from latentrt.benchmarks.peers import keeping


def test_a_folder_is_made_once_though_many_ask(tmp_path: Path) -> None:
    """Of several that want a folder at a time one makes it, and the others wait until it is whole."""
    makes, seen = [], []

    def make(folder: Path) -> None:
        makes.append(folder)
        time.sleep(0.1)
        (folder / "file").touch()

    def ask() -> None:
        seconds = keeping.keep(tmp_path / "kept", make)
        seen.append((seconds is None, (tmp_path / "kept" / "file").exists()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makes) == 1
    assert sorted(seen) == [(False, True), (True, True), (True, True), (True, True)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_folder_is_gone(tmp_path: Path, error: type[BaseException]) -> None:
    """What an interrupted maker wrote is removed, and what a killed one left is made anew."""

    def stop(folder: Path) -> None:
        (folder / "half").touch()
        raise error

    with pytest.raises(error):
        keeping.keep(tmp_path / "kept", stop)
    assert not (tmp_path / "kept").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "half").touch()
    assert keeping.keep(tmp_path / "kept", lambda folder: (folder / "whole").touch()) is not None
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"whole", keeping.MARKER}
    assert keeping.keep(tmp_path / "kept", stop) is None
