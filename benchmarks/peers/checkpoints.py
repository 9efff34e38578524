"""Parts that conversions of a checkpoint share: its fingerprint, tools in processes of their own, names of tensors.

The module imports only the standard library, because it runs in environments without LatentRT.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NESTED = "text_model."
"""Prefix of CLIP's tensors in all releases of transformers before 5.6, and so in nearly all checkpoints."""

_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def fingerprint(source: Path, *also: str) -> str:
    """Eight hexadecimal digits that depend on the files of a checkpoint (path, size, time) and on ``also``.

    Contents are not read: reading gigabytes would take longer than loading them.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file())
    facts = [f"{path.relative_to(source)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join((str(source.resolve()), *facts, *also)).encode()).hexdigest()[:8]


def run_tool(name: str, command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a program in a process of its own, which ends with this one and whose memory does not count as this one's.

    Args:
        name: The program's name in messages.
        command: The command that starts it.
        environment: Environment variables besides those of this process.

    Returns:
        Its output, which is printed to standard error too.

    Raises:
        RuntimeError: if it fails; the message has ``name`` and the program's last lines.
    """
    with tempfile.TemporaryFile() as log:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            check=False,
        )
        log.seek(0)
        text = log.read().decode(errors="replace")
    print(text, file=sys.stderr)
    if done.returncode != 0:
        last = " ".join(" ".join(text.splitlines()[-3:]).split())
        raise RuntimeError(f"{name} ended with status {done.returncode}: {last}")
    return text


def has_nested_names(source: Path) -> bool:
    """Whether the names of all tensors of a checkpoint's text encoder begin with :data:`NESTED`."""
    files = sorted((source / "text_encoder").glob("*.safetensors"))
    return bool(files) and all(
        name.startswith(NESTED) for file in files for name in read_header(file)[0] if name != "__metadata__"
    )


def nest_text_encoder(source: Path, target: Path) -> None:
    """Fill ``target`` with links to a checkpoint, and a text encoder whose tensors' names begin with :data:`NESTED`.

    transformers 5.6 and later leave the prefix out. Older releases, and libraries that read their layout, do not know
    such names: transformers then draws weights at random, with no more than a warning.
    """
    for entry in source.iterdir():
        if entry.name != "text_encoder":
            (target / entry.name).symlink_to(entry.resolve())
    (target / "text_encoder").mkdir()
    for entry in (source / "text_encoder").iterdir():
        copy = target / "text_encoder" / entry.name
        if entry.suffix == ".safetensors":
            rename_tensors(entry, copy, lambda name: name if name.startswith(NESTED) else NESTED + name)
        elif entry.name.endswith(".safetensors.index.json"):
            index = json.loads(entry.read_text(encoding="utf-8"))
            names = index["weight_map"].items()
            index["weight_map"] = {NESTED + name.removeprefix(NESTED): file for name, file in names}
            copy.write_text(json.dumps(index), encoding="utf-8")
        else:
            copy.symlink_to(entry.resolve())


def rename_tensors(source: Path, target: Path, rename: Callable[[str], str]) -> None:
    """Copy a safetensors file, with other names for its tensors.

    The format is a length of 8 bytes, little endian, a JSON object of that length, and the tensors' bytes, see
    https://huggingface.co/docs/safetensors.

    Raises:
        ValueError: if two tensors would have the same name.
    """
    header, end = read_header(source)
    renamed = {key if key == "__metadata__" else rename(key): value for key, value in header.items()}
    if len(renamed) != len(header):
        raise ValueError(f"{source}: two tensors would have the same name")
    text = json.dumps(renamed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    with source.open("rb") as file, target.open("wb") as copy:
        file.seek(end)
        copy.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(file, copy, 1 << 24)


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the number of bytes before the tensors.

    Raises:
        ValueError: if the file is no safetensors file.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _LARGEST_HEADER:
            raise ValueError(f"{file} is no safetensors file: its header would have {length} bytes")
        header: dict[str, Any] = json.loads(opened.read(length))
    return header, 8 + length


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder in bytes, through links too."""
    return sum(
        (Path(where) / name).stat().st_size for where, _, names in os.walk(folder, followlinks=True) for name in names
    )


def _end_with_parent() -> None:
    """Let Linux end this process when its parent ends for any reason, see prctl(2)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
