"""Records of compiled engines (``engine.json``), and the keys that name them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .checks import is_integer
from .errors import BundleIntegrityError, BundleVersionError

FORMAT_VERSION = 2
"""Version of ``engine.json`` that this version writes and reads."""

RECORD_NAME = "engine.json"
"""Name of a record inside an engine's directory."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
"""Names that a compiled file may have."""

Shapes: TypeAlias = Mapping[str, Sequence[Sequence[int]]]
"""An optimisation profile: input name -> (minimum, optimum, maximum) shape."""

_MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class EngineRecord:
    """The content of ``engine.json``: facts of a compiled engine.

    Attributes:
        key: Its key, from :func:`engine_key`, and the name of its directory.
        engine: Name of the engine, e.g. ``"tensorrt-rtx"``.
        component: Part of the model that it computes, e.g. ``"unet"``.
        file: Plain name of the compiled file, inside the directory.
        size: Length of that file in bytes.
        sha256: Its SHA-256, in hex.
        precision: ``"fp32"``, ``"fp16"``, ...
        profile: Input name -> (minimum, optimum, maximum) shape, for the inputs with dynamic shapes.
        flags: Builder options by name, as they went into the key; None where the builder's defaults were used.
        sdk: Name of the SDK that compiled it.
        sdk_version: Version of that SDK.
        target: Hardware that it runs on: ``"sm_90"``, ``"sm_80+"``, a CPU instruction set.
        built_seconds: Duration of compiling.
        created: Time of compiling in UTC, ISO 8601.
    """

    key: str
    engine: str
    component: str
    file: str
    size: int
    sha256: str
    precision: str
    profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    flags: Mapping[str, Any] | None
    sdk: str
    sdk_version: str
    target: str
    built_seconds: float
    created: str


def engine_key(
    *,
    graph: str,
    weights: Mapping[str, str],
    engine: str,
    sdk: str,
    sdk_version: str,
    precision: str,
    profile: Shapes,
    flags: Mapping[str, Any],
    target: str,
) -> str:
    """Name an engine by all that decides it; change any of it and the key is another.

    Args:
        graph: SHA-256 (hex) of the ONNX graph file.
        weights: Name -> SHA-256 (hex) of every external weights file that the graph uses.
        engine: Name of the engine, e.g. ``"tensorrt-rtx"``.
        sdk: Name of the SDK.
        sdk_version: Version of the SDK, in full.
        precision: ``"fp32"``, ``"fp16"``, ...
        profile: Input name -> (minimum, optimum, maximum) shape.
        flags: Builder options by name, JSON values.
        target: GPU architecture or compute-capability target, or CPU instruction set.

    Returns:
        The first 24 hex digits (96 bits) of the SHA-256 of all this in canonical JSON.
    """
    decides = {
        "graph": graph,
        "weights": dict(weights),
        "engine": engine,
        "sdk": sdk,
        "sdk_version": sdk_version,
        "precision": precision,
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in profile.items()},
        "flags": dict(flags),
        "target": target,
    }
    canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_engine(directory: Path, key: str, verify_hash: bool) -> EngineRecord:
    """Read the record of an engine, and look at its compiled file.

    Args:
        directory: The engine's directory.
        key: The key that it must have.
        verify_hash: Compare the SHA-256 of the compiled file, besides its size.

    Raises:
        BundleIntegrityError: naming the damage.
        BundleVersionError: if the record is of another format version.
    """
    if not stat.S_ISDIR(os.lstat(directory).st_mode):
        raise BundleIntegrityError(f"engine {key} is not a directory; delete {directory} and build it again")
    try:
        record = _read_record(directory, key)
        check_file(directory, record)
        if verify_hash and file_sha256(directory / record.file) != record.sha256:
            raise _damaged(directory, f"the SHA-256 of {record.file} is not the recorded one")
    except OSError as error:
        raise _damaged(directory, f"it cannot be read ({error.strerror or error})") from error
    return record


def _damaged(directory: Path, what: str) -> BundleIntegrityError:
    return BundleIntegrityError(f"engine {directory.name} is damaged: {what}; delete {directory} and build it again")


def _regular_size(directory: Path, name: str) -> int:
    try:
        status = os.lstat(directory / name)
    except FileNotFoundError:
        raise _damaged(directory, f"{name} is missing") from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise _damaged(directory, f"{name} is a link or no regular file")
    return status.st_size


def check_file(directory: Path, record: EngineRecord) -> None:
    """Check that the compiled file of an engine is a regular file of the recorded size.

    Raises:
        BundleIntegrityError: if it is not.
    """
    size = _regular_size(directory, record.file)
    if size != record.size:
        raise _damaged(directory, f"{record.file} has {size} bytes, its record says {record.size}")


def _read_record(directory: Path, key: str) -> EngineRecord:
    if _regular_size(directory, RECORD_NAME) > _MAX_RECORD_BYTES:
        raise _damaged(directory, f"{RECORD_NAME} is larger than {_MAX_RECORD_BYTES} bytes")
    try:
        data = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
        version = data.pop("format_version")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(directory, f"{RECORD_NAME} is no engine record ({type(error).__name__})") from error
    if version != FORMAT_VERSION:
        raise BundleVersionError(
            f"engine {key} has a record of format version {version!r}, this version of LatentRT reads "
            f"{FORMAT_VERSION}; delete {directory} and build it again"
        )
    kinds: dict[str, tuple[type, ...]] = {field.name: (str,) for field in dataclasses.fields(EngineRecord)}
    kinds |= {"size": (int,), "built_seconds": (int, float), "profile": (dict,)}
    kinds["flags"] = (dict, type(None))
    if wrong := sorted(data.keys() ^ kinds.keys()):
        raise _damaged(directory, f"{RECORD_NAME} lacks or adds {wrong[0]!r}")
    if wrong := [name for name, kind in kinds.items() if not isinstance(data[name], kind)]:
        raise _damaged(directory, f"{RECORD_NAME} has {wrong[0]} = {data[wrong[0]]!r:.40}")
    if data["key"] != key:
        raise _damaged(directory, f"its record is of engine {data['key']!r:.40}")
    if not PLAIN_NAME.fullmatch(data["file"]) or data["file"] == RECORD_NAME:
        raise _damaged(directory, f"its record names the file {data['file']!r:.80}, which is no plain file name")
    try:
        data["profile"] = as_profile(data["profile"])
    except (TypeError, ValueError) as error:
        raise _damaged(directory, f"{RECORD_NAME} has a profile that is none") from error
    return EngineRecord(**data)


def as_profile(shapes: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Shapes as a record holds them.

    Raises:
        ValueError: if a length is not an integer, or an entry has not three shapes.
        TypeError: if something is no sequence.
    """
    result = {}
    for name, entry in shapes.items():
        smallest, usual, largest = entry
        if not all(is_integer(length) for shape in (smallest, usual, largest) for length in shape):
            raise ValueError(name)
        result[name] = (tuple(map(int, smallest)), tuple(map(int, usual)), tuple(map(int, largest)))
    return result
