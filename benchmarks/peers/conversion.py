"""Conversion of a checkpoint to a peer's own form, which is made once and kept in the job's workspace.

A conversion runs in a process of its own, because its memory must not count as that of drawing. The process is
``launch.py NAME SOURCE TARGET``, which calls ``convert(source, target)`` of the peer's module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import wire
from .checkpoints import fingerprint
from .keeping import keep

_RESULT = "conversion.json"
_KILLED = -9


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Attributes:
        folder: The folder with the result.
        seconds: Seconds of converting; ``None`` if an earlier result was found.
        notes: Adaptations that were necessary, a sentence each.
    """

    folder: Path
    seconds: float | None
    notes: list[str]


def converted(name: str, source: Path, workspace: Path, settings: Mapping[str, str]) -> Converted:
    """Convert a checkpoint, or find an earlier conversion.

    Args:
        name: Name of the peer's module.
        source: The checkpoint's directory.
        workspace: The folder that conversions are kept in.
        settings: Everything else that decides the result, such as versions of packages.

    Raises:
        MemoryError: if the process was killed, as Linux kills one that takes too much memory.
        RuntimeError: if converting failed; the message is the reason.
        UnsupportedError: if the peer does not support this checkpoint.
    """
    decides = (f"{key} {value}" for key, value in sorted(settings.items()))
    folder = workspace / f"{name.replace('_', '-')}-{fingerprint(source, *decides)}"
    seconds = keep(folder, lambda target: _run_apart(name, source, target))
    notes = json.loads((folder / _RESULT).read_text(encoding="utf-8"))["notes"]
    return Converted(folder, seconds, notes)


def main(convert: Callable[[Path, Path], list[str]], source: str, target: str) -> int:
    """Convert in this process, and write the result for the parent; returns the exit status."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result: dict[str, object]
    try:
        result = {"notes": convert(Path(source), Path(target))}
    except wire.UnsupportedError as error:
        result = {"unsupported": str(error)}
    except Exception as error:  # noqa: BLE001 - any exception of a library is the reason of a failed conversion
        traceback.print_exc()
        result = {"error": wire.sentence(error)}
    (Path(target) / _RESULT).write_text(json.dumps(result), encoding="utf-8")
    return 0 if "notes" in result else 1


def _run_apart(name: str, source: Path, target: Path) -> None:
    launcher = Path(__file__).with_name("launch.py")
    command = [sys.executable, str(launcher), name, str(source), str(target)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        status = process.wait()
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
    if status == 0:
        return
    if status == _KILLED:
        raise MemoryError("the process that converted the checkpoint was killed, most likely for want of memory")
    path = target / _RESULT
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "unsupported" in result:
        raise wire.UnsupportedError(result["unsupported"])
    raise RuntimeError(f"converting the checkpoint failed: {result.get('error', f'exit status {status}')}")


def _end_with_parent() -> None:
    """End this process when the parent ends for any reason: its end of the pipe closes then."""
    os.read(0, 1)  # sys.stdin would hold a lock when the interpreter ends
    os._exit(1)
