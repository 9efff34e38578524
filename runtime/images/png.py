"""PNG files that carry how they were made, and contact sheets.

The text lies in a chunk with the keyword ``parameters`` and has the form that AUTOMATIC1111's Stable Diffusion web UI
writes (its ``modules/processing.py``, ``create_infotext``) and that other tools and image sites read. Chunks: PNG
specification, third edition, sections 11.3.3.2 (``tEXt``, Latin-1) and 11.3.3.4 (``iTXt``, UTF-8).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from latentrt.engines.errors import InvalidRequestError, OutputError

KEYWORD = "parameters"
"""Keyword of the PNG text chunk."""

SAMPLER_LABELS: Mapping[str, str] = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpm2": "DPM2",
    "dpm2-a": "DPM2 a",
    "dpmpp-2s-a": "DPM++ 2S a",
    "dpmpp-2m": "DPM++ 2M",
    "dpmpp-2m-sde": "DPM++ 2M SDE",
    "dpmpp-3m-sde": "DPM++ 3M SDE",
    "dpmpp-sde": "DPM++ SDE",
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "tcd": "TCD",
    "unipc": "UniPC",
}
"""Names of samplers in the web UI; a sampler that is not listed is written under its own name."""


def program_name() -> str:
    """Program and version, for the text of files."""
    try:
        return f"latentrt {version('latentrt')}"
    except PackageNotFoundError:
        # Applications frozen into one file carry no metadata, which is no reason to lose an image.
        return "latentrt"


@dataclass(frozen=True)
class GenerationParameters:
    """How an image was made.

    Attributes:
        prompt: The prompt.
        negative_prompt: The negative prompt; left out of the text if empty.
        steps: Number of sampler steps.
        sampler: Name of the sampler, such as ``"dpmpp-2m"``; the text has the web UI's name.
        guidance: Scale of classifier-free guidance.
        seed: Seed of the image's noise.
        width: Width in pixels.
        height: Height in pixels.
        model: Name of the model.
        clip_skip: Layers of the text encoder that were left out, 0 for none; the text counts from 1, as web UIs do.
        extra: Further entries by label, such as ``{"Engine": "onnxruntime"}``; a label is letters, digits, spaces,
            ``-`` and ``/``.
        program: Program and version.
    """

    prompt: str
    negative_prompt: str
    steps: int
    sampler: str
    guidance: float
    seed: int
    width: int
    height: int
    model: str
    clip_skip: int = 0
    extra: Mapping[str, object] = field(default_factory=dict)
    program: str = field(default_factory=program_name)

    def to_text(self) -> str:
        """The text of the ``parameters`` chunk: prompt, negative prompt, and one line of comma-separated entries.

        Noise comes from PyTorch's CPU stream, which the web UI calls ``RNG: CPU``.
        """
        entries: dict[str, object] = {
            "Steps": self.steps,
            "Sampler": SAMPLER_LABELS.get(self.sampler, self.sampler),
            "CFG scale": int(self.guidance) if float(self.guidance).is_integer() else self.guidance,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
            **({"Clip skip": self.clip_skip + 1} if self.clip_skip else {}),
            "RNG": "CPU",
            **self.extra,
            "Version": self.program,
        }
        negative = f"\nNegative prompt: {self.negative_prompt}" if self.negative_prompt else ""
        line = ", ".join(f"{label}: {_quoted(str(value))}" for label, value in entries.items())
        return f"{self.prompt}{negative}\n{line}".strip()


def write_png(
    path: str | os.PathLike[str],
    pixels: NDArray[np.uint8],
    parameters: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a PNG file whole or not at all.

    The image is written to a temporary file beside the target, brought to the disk, and only then renamed; an older
    file of that name stays until that moment. A symbolic link is followed.

    Args:
        path: The file to write; its directory must exist.
        pixels: uint8 ``[height, width, 3]``, RGB.
        parameters: Text for the ``parameters`` chunk, as :meth:`GenerationParameters.to_text` makes it; ``tEXt`` where
            Latin-1 suffices, else ``iTXt``. NUL, which PNG text cannot hold, becomes U+FFFD.
        texts: Further text by keyword.

    Raises:
        InvalidRequestError: if ``pixels`` is no such array, or ``parameters`` has lone surrogates.
        OutputError: if the file cannot be written; the temporary file is gone by then.
    """
    _check_pixels(pixels, "pixels", 3)
    info = PngImagePlugin.PngInfo()
    for keyword, text in {**({} if parameters is None else {KEYWORD: parameters}), **(texts or {})}.items():
        try:
            info.add_text(keyword, text.replace("\0", "\ufffd"))
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"parameters have a lone surrogate at position {error.start}, expected text that UTF-8 can hold"
            ) from None
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", pnginfo=info)
    _replace(Path(path), buffer.getvalue())


def read_parameters(path: str | os.PathLike[str]) -> str | None:
    """Text of the ``parameters`` chunk of a PNG file, whichever tool wrote it, see :func:`read_text`."""
    return read_text(path, KEYWORD)


def read_text(path: str | os.PathLike[str], keyword: str) -> str | None:
    """Text of a chunk of a PNG file.

    Returns:
        The text, or None if the file has no such chunk.

    Raises:
        InvalidRequestError: if the file cannot be read or is no sound PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            # Text usually precedes the pixels; the rest of the file is decoded only where it does not.
            text = image.info.get(keyword)
            if text is None and isinstance(image, PngImagePlugin.PngImageFile):
                text = image.text.get(keyword)
    except OSError as error:
        reason = error.strerror or "it is no sound PNG file"
        raise InvalidRequestError(f"cannot read {os.fspath(path)!r}: {reason}") from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequestError(f"cannot read {os.fspath(path)!r}: it is no sound PNG file") from error
    return None if text is None else str(text)


def sheet(images: NDArray[np.uint8], columns: int, gap: int = 0) -> NDArray[np.uint8]:
    """Lay images out on one, row by row, on white.

    Args:
        images: uint8 ``[number, height, width, 3]``, at least one.
        columns: Images in a row, at least 1.
        gap: Pixels between images, at least 0.

    Returns:
        uint8 ``[rows * height + (rows - 1) * gap, columns * width + (columns - 1) * gap, 3]``; a single, unfilled row
        is as wide as its images.

    Raises:
        InvalidRequestError: if an argument is out of range, or ``images`` is no such array.
    """
    _check_pixels(images, "images", 4)
    if columns < 1 or gap < 0:
        raise InvalidRequestError(f"columns is {columns} and gap {gap}, expected at least 1 and 0")
    number, height, width, channels = images.shape
    columns = min(columns, number)
    rows = -(-number // columns)
    cells = np.full((rows * columns, height + gap, width + gap, channels), 255, np.uint8)
    cells[:number, :height, :width] = images
    grid = cells.reshape(rows, columns, height + gap, width + gap, channels).swapaxes(1, 2)
    whole = grid.reshape(rows * (height + gap), columns * (width + gap), channels)
    return np.ascontiguousarray(whole[: whole.shape[0] - gap, : whole.shape[1] - gap])


def _check_pixels(pixels: NDArray[Any], name: str, dimensions: int) -> None:
    """Raise InvalidRequestError unless ``pixels`` is a non-empty uint8 array ``[..., height, width, 3]``."""
    expected = "uint8 [height, width, 3]" if dimensions == 3 else "uint8 [number, height, width, 3]"
    if not isinstance(pixels, np.ndarray):
        raise InvalidRequestError(f"{name} is {type(pixels).__name__}, expected an array {expected}")
    if pixels.dtype != np.uint8 or pixels.ndim != dimensions or pixels.shape[-1] != 3 or not pixels.size:
        raise InvalidRequestError(f"{name} is {pixels.dtype} {list(pixels.shape)}, expected {expected}, not empty")


def _quoted(text: str) -> str:
    # The web UI reads a value in double quotes as JSON; unquoted, these characters would end it.
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ",:\n") else text


def check_target(path: Path) -> Path:
    """Refuse a place where no file can be put, before work is spent on the content.

    Returns:
        The file's real place, links followed.

    Raises:
        OutputError: if something else than a file is there, or the directory does not exist.
    """
    try:
        target = path.resolve()
        # Renaming over a device or a pipe would destroy it.
        if target.exists() and not target.is_file():
            raise OutputError(f"cannot write {path}: it is {_kind(target)}, expected the name of a file")
        if not target.parent.is_dir():
            raise OutputError(f"cannot write {path}: there is no directory {target.parent}; create it first")
    except OutputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        # ValueError: a NUL in the name. RuntimeError: a loop of links, before Python 3.13.
        raise _unwritable(path, error) from error
    return target


def _unwritable(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"cannot write {path}: {reason}; choose a place that can be written to")


def _replace(path: Path, data: bytes) -> None:
    """Make ``data`` the content of ``path`` in one step.

    Raises:
        OutputError: if the file cannot be written; nothing is left behind, and an older file is unchanged.
    """
    temporary: Path | None = None
    try:
        target = check_target(path)
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        temporary = None
    except OutputError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _kind(path: Path) -> str:
    return "a directory" if path.is_dir() else "a device or a pipe"
