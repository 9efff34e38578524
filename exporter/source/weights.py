"""Reading safetensors without trusting them: lengths are held against the file before anything is allocated."""

from __future__ import annotations

import contextlib
import json
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from latentrt.engines.errors import SourceError

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Endings of files that Python's pickle reads, which can run code."""
VARIANTS = ("", "fp16")
"""Variants of weights that are taken where none is asked for, in that order; the first has no name."""
MAX_JSON = 16 * 2**20
"""Largest configuration file in bytes."""

_MAX_HEADER = 100 * 2**20


def read_json(path: Path, meaning: str) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Args:
        path: The file.
        meaning: The meaning of a missing file, for the message.

    Raises:
        SourceError: if it is missing, too large, or no JSON object.
    """
    label = f"{path.parent.name}/{path.name}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{label} is no regular file; a configuration file is expected")
        if status.st_size > MAX_JSON:
            raise SourceError(f"{path.name} has over {MAX_JSON // 2**20} MiB; a configuration file is expected")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{label} is missing: {meaning}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise SourceError(f"{label} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{label} holds a {type(content).__name__}, expected a JSON object")
    return content


def weight_files(directory: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component: one file, or the shards of an index.

    Args:
        directory: Its folder.
        stem: Name of the files, without ending.
        variant: Such as ``"fp16"``, for files like ``model.fp16.safetensors``; ``None`` takes those without a variant,
            or else those of fp16.

    Raises:
        SourceError: if there are none; the message says so where there are pickled weights instead.
    """
    for name in VARIANTS if variant is None else (variant,):
        infix = f".{name}" if name else ""
        if (directory / f"{stem}{infix}.safetensors").is_file():
            return [directory / f"{stem}{infix}.safetensors"]
        index_path = directory / f"{stem}.safetensors.index{infix}.json"
        if index_path.is_file():
            return _shards(index_path)
    pickled = sorted(file.name for file in directory.glob("*") if file.suffix in PICKLED)
    if pickled:
        raise SourceError(
            f"{directory.name} has only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them to safetensors first"
        )
    raise SourceError(f"{directory.name}/{stem}{f'.{variant}' if variant else ''}.safetensors is missing")


def _shards(index_path: Path) -> list[Path]:
    directory = index_path.parent
    shards = read_json(index_path, "the index of the weights is missing").get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise SourceError(
            f"{directory.name}/{index_path.name} does not name the shards of the weights: "
            "plain names that end with .safetensors are expected"
        )
    if missing := [name for name in sorted(names) if not (directory / name).is_file()]:
        raise SourceError(f"{directory.name}/{missing[0]} is missing, but the index of the weights names it")
    return [directory / name for name in sorted(names)]


def read_weights(
    directory: Path, stem: str, variant: str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """All tensors of a component, by name. It takes the arguments of :func:`weight_files` and :func:`read_tensors`.

    Raises:
        SourceError: if a file is truncated or damaged, a tensor stands twice, or a value is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory, stem, variant):
        with opened(file) as content:
            for name, tensor in read_tensors(content, content.keys(), directory.name, dtype):
                if name in tensors:
                    raise SourceError(f"{directory.name}: the tensor {name!r} stands in two files")
                tensors[name] = tensor
    return tensors


def read_tensors(
    content: Any, names: Iterable[str], label: str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an opened file.

    Args:
        content: The file, as :func:`opened` gives it.
        names: Names of the tensors.
        label: Name of the file in messages.
        dtype: Element type for floating-point tensors; one that leaves its range is given as fp32. A tensor that the
            file has in this type takes no memory of its own.

    Raises:
        SourceError: if a value is not finite.
    """
    for name in names:
        tensor = content.get_tensor(name)
        if tensor.is_floating_point():
            wide = tensor if tensor.dtype == dtype else tensor.float()
            if not bool(torch.isfinite(wide).all()):
                raise SourceError(f"{label}: the tensor {name!r} holds NaN or infinity")
            tensor = wide.to(dtype)
            if tensor is not wide and not bool(torch.isfinite(tensor).all()):
                tensor = wide
        yield name, tensor


@contextlib.contextmanager
def opened(file: Path, label: str | None = None) -> Iterator[Any]:
    """Open a safetensors file, and translate errors while it is open.

    Args:
        file: The file.
        label: Its name in messages; by default its name after that of its directory.

    Raises:
        SourceError: if it is damaged, or claims more than it holds.
    """
    label = label or f"{file.parent.name}/{file.name}"
    try:
        _check_header(file, label)
        with safe_open(file, framework="pt") as content:
            yield content
    except SourceError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{label} is damaged: {first_line(error)}") from error


def _check_header(file: Path, label: str) -> None:
    """Refuse a header that claims more than the file holds before anything reads it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise SourceError(f"{label} is damaged: its header claims {length:,} bytes of a file of {size:,}")


def empty_module(build: Callable[[Mapping[str, Any]], nn.Module], config: Mapping[str, Any], name: str) -> nn.Module:
    """A part without weights: whatever sizes its configuration names, nothing is allocated.

    Raises:
        SourceError: if the configuration describes no model.
    """
    try:
        with torch.device("meta"):
            return build(config)
    except Exception as error:  # the libraries raise whatever their constructors run into
        raise SourceError(f"{name}/config.json does not describe a model: {first_line(error)}") from error


def assign(module: nn.Module, tensors: dict[str, Tensor], component: str) -> None:
    """Make tensors the weights of a module.

    Raises:
        SourceError: if one is missing, has another shape or no place, or holds whole numbers.
    """
    for name, _ in module.named_parameters():
        if name in tensors and not tensors[name].is_floating_point():
            kind = str(tensors[name].dtype).removeprefix("torch.")
            raise SourceError(f"weights of {component}: {name!r} is {kind}; quantised weights are not supported")
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        detail = lines[1] if len(lines) > 1 else lines[0]
        raise SourceError(f"weights of {component} do not fit its config.json: {detail[:200]}") from error


def first_line(error: BaseException) -> str:
    """The message of an exception, in one line of bounded length."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
