"""A peer's own form of a checkpoint: made once, kept in the job's workspace.

Converting runs in a process of its own, or the memory that it takes would count as that of drawing. The process is
``launch.py NAME SOURCE TARGET``, which calls ``convert(source, target)`` of the peer's module.
"""

from __future__ import annotations

import hashlib
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
from .keeping import keep

_RESULT = "conversion.json"
_KILLED = -9


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Attributes:
        folder: Where it is.
        seconds: What converting took, None if it was kept from before.
        notes: What had to be adapted, a sentence each.
    """

    folder: Path
    seconds: float | None
    notes: list[str]


def converted(name: str, source: Path, workspace: Path, settings: Mapping[str, str]) -> Converted:
    """Convert a checkpoint, or find it converted.

    Args:
        name: Module of the peer.
        source: The checkpoint's directory.
        workspace: Where conversions are kept.
        settings: All else that decides the result, such as versions of packages.

    Raises:
        MemoryError: if the process was killed, as Linux does with one that takes too much.
        RuntimeError: if converting failed; the message is the reason.
        UnsupportedError: if the peer cannot take this checkpoint.
    """
    folder = workspace / f"{name.replace('_', '-')}-{_key(source, settings)}"
    seconds = keep(folder, lambda target: _run_apart(name, source, target))
    notes = json.loads((folder / _RESULT).read_text(encoding="utf-8"))["notes"]
    return Converted(folder, seconds, notes)


def main(convert: Callable[[Path, Path], list[str]], source: str, target: str) -> int:
    """The process that converts; returns its exit status."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result: dict[str, object]
    try:
        result = {"notes": convert(Path(source), Path(target))}
    except wire.UnsupportedError as error:
        result = {"unsupported": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a library raises is why it cannot convert
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
    """End when the parent does, however it ends: its end of the pipe closes then."""
    os.read(0, 1)  # not sys.stdin, whose lock would be held when the interpreter ends
    os._exit(1)


def _key(source: Path, settings: Mapping[str, str]) -> str:
    """Name a conversion by what decides it; files by size and time, for reading gigabytes takes longer than loading."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    listed = [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([str(source.resolve()), listed, dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
