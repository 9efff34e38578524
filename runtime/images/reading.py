"""Images that a caller gives: read from any form, turned upright, and bounded before decoding."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from latentrt.engines.errors import InvalidRequestError

Picture: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]
"""A file, a file's content, a Pillow image, or an array ``[height, width, 3]``: uint8, or float from 0 to 1."""
Mode = Literal["RGB", "L"]
"""Colours, or the one channel of a mask."""

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
"""Formats of files that are read; of several frames, the first is taken."""
MAX_SIDE = 16384
"""Largest width or height in pixels."""
MAX_PIXELS = 2**26
"""Most pixels of one image, and of several that are given together."""
MAX_BYTES = 2**28
"""Largest file, in bytes."""

_SIXTEEN = ("I", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class PictureRecord:
    """The record of an image that a request was made with.

    Attributes:
        sha256: SHA-256 of the file; for an image that was no file, of its shape and pixels.
        path: The file's name, as the caller gave it; ``None`` if there was no file.
    """

    sha256: str
    path: str | None = None


@dataclass(frozen=True)
class ReadPicture:
    """An image that was read.

    Attributes:
        pixels: uint8 ``[height, width, 3]`` in colours, ``[height, width]`` of a mask.
        digest: SHA-256 of the file; for an image that was no file, of its shape and pixels.
        path: The file's name, as the caller gave it; ``None`` if there was no file.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    digest: str
    path: str | None = None

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.pixels.shape[0])

    @property
    def record(self) -> PictureRecord:
        """The record that a request keeps of the image."""
        return PictureRecord(self.digest, self.path)


def read_picture(given: object, name: str, mode: Mode = "RGB") -> ReadPicture:
    """Read an image in any form.

    It is turned upright as its EXIF says. Palettes, CMYK and 16 bits become 8 bits of RGB; colour profiles are ignored.
    In ``"RGB"`` transparent parts are laid over white. In ``"L"`` an image in colours becomes its luminance
    (ITU-R 601-2), and transparent parts become black; but where all that can be seen has one colour, the opacity is the
    mask, since somebody has drawn it on an empty layer.

    Args:
        given: A :data:`Picture`. An array is ``[height, width]`` or ``[height, width, 1, 3 or 4]``: uint8, bool, or
            float from 0 to 1.
        name: Its name in messages.
        mode: ``"RGB"``, or ``"L"`` for masks.

    Raises:
        InvalidRequestError: if it is no image, broken, or too large; the size is checked before pixels are decoded.
    """
    if isinstance(given, np.ndarray):
        pixels = _converted(Image.fromarray(_bytes_of(given, name)), mode, name)
        return ReadPicture(pixels, _digest(pixels))
    if isinstance(given, Image.Image):
        image = given
        pixels = _decoded(lambda: image, mode, name, "it is broken")
        return ReadPicture(pixels, _digest(pixels))
    path = None
    if isinstance(given, str | os.PathLike):
        path = os.fspath(given)
        if not isinstance(path, str):
            raise InvalidRequestError(f"{name} is the file {path!r}, expected its name as a string")
        given = _content(path, name)
    if not isinstance(given, bytes):
        raise InvalidRequestError(
            f"{name} is a {type(given).__name__}, expected a file, its content, a Pillow image or an array"
        )
    content = given
    what = f"it is broken, or none of {', '.join(FORMATS)}"
    pixels = _decoded(lambda: Image.open(BytesIO(content), formats=FORMATS), mode, name, what)
    return ReadPicture(pixels, hashlib.sha256(content).hexdigest(), path)


def read_pictures(given: object, name: str, mode: Mode = "RGB") -> tuple[ReadPicture, ...]:
    """Read one image or several of one size.

    Args:
        given: An image as for :func:`read_picture`, a list of those, or an array ``[k, height, width, 3]``.
        name: Its name in messages.
        mode: ``"RGB"``, or ``"L"`` for masks.

    Raises:
        InvalidRequestError: as :func:`read_picture`, and if they differ in size or have too many pixels together.
    """
    several = isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.ndim == 4)
    if not several:
        return (read_picture(given, name, mode),)
    entries: Sequence[Any] = given  # type: ignore[assignment]
    if not len(entries):
        raise InvalidRequestError(f"{name} is empty, expected at least one image")
    found: list[ReadPicture] = []
    for number, entry in enumerate(entries):
        picture = read_picture(entry, f"{name}[{number}]", mode)
        if found and picture.pixels.shape != found[0].pixels.shape:
            raise InvalidRequestError(
                f"{name}[{number}] is {picture.width}x{picture.height} and {name}[0] "
                f"{found[0].width}x{found[0].height}, expected images of one size"
            )
        if (pixels := (number + 1) * picture.width * picture.height) > MAX_PIXELS:
            raise InvalidRequestError(f"{name} has {pixels:,} pixels or more, expected at most {MAX_PIXELS:,} together")
        found.append(picture)
    return tuple(found)


def _content(path: str, name: str) -> bytes:
    try:
        # Before it is opened: a pipe would wait for somebody to write into it, a device may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InvalidRequestError(f"{name} is {path!r}, which is no file; give the name of an image")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except InvalidRequestError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidRequestError(f"cannot read {name} from {path!r}: {reason}") from error
    if len(content) > MAX_BYTES:
        raise InvalidRequestError(f"{name} is {path!r}, a file of more than {MAX_BYTES >> 20} MiB; give a smaller one")
    return content


def _decoded(opened: Callable[[], Image.Image], mode: Mode, name: str, broken: str) -> NDArray[np.uint8]:
    try:
        image = opened()
        _check_size(image.width, image.height, name)
        return _converted(ImageOps.exif_transpose(image), mode, name)
    except InvalidRequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequestError(f"{name} has far more than {MAX_PIXELS:,} pixels; scale it down first") from error
    except Exception as error:  # Pillow's decoders raise all sorts of things at files that somebody has tampered with
        raise InvalidRequestError(f"cannot read {name}: {broken}") from error


def _check_size(width: int, height: int, name: str) -> None:
    if not width or not height:
        raise InvalidRequestError(f"{name} is {width}x{height}, expected at least one pixel")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InvalidRequestError(
            f"{name} is {width}x{height}, expected sides of at most {MAX_SIDE:,} and {MAX_PIXELS:,} pixels; "
            "scale it down first"
        )


def _bytes_of(given: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """uint8 ``[h, w]`` or ``[h, w, 3 or 4]``."""
    if given.ndim == 3 and given.shape[2] == 1:
        given = given[:, :, 0]
    if given.ndim not in (2, 3) or (given.ndim == 3 and given.shape[2] not in (3, 4)):
        raise InvalidRequestError(f"{name} has the shape {list(given.shape)}, expected [height, width, 3]")
    _check_size(given.shape[1], given.shape[0], name)
    if given.dtype == np.bool_:
        return given.astype(np.uint8) * np.uint8(255)
    if given.dtype == np.uint8:
        return np.ascontiguousarray(given)
    if given.dtype.kind != "f":
        raise InvalidRequestError(f"{name} is an array of {given.dtype}, expected uint8, or float from 0 to 1")
    return _scaled(given, name)


def _scaled(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Floats from 0 to 1 as bytes."""
    low, high = float(values.min()), float(values.max())  # NaN if there is any
    if not (low >= 0 and high <= 1):
        raise InvalidRequestError(f"{name} has floats from {low:g} to {high:g}, expected 0 to 1")
    return (values.astype(np.float32) * 255).round().astype(np.uint8)


def _converted(image: Image.Image, mode: Mode, name: str) -> NDArray[np.uint8]:
    if image.mode in _SIXTEEN:
        image = _eight_bits(image, name)
    elif image.mode == "F":
        image = Image.fromarray(_scaled(np.asarray(image), name))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _flattened(image.convert("RGBA"), mode)
    return np.array(image.convert(mode))


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise InvalidRequestError(
            f"{name} has values from {values.min()} to {values.max()}, expected at most 16 bits; convert it first"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _flattened(image: Image.Image, mode: Mode) -> Image.Image:
    """An image without its transparency."""
    if mode == "L":
        colours, opacity = np.array(image)[..., :3], np.array(image)[..., 3]
        seen = colours[opacity > 0]
        if opacity.min() < 255 and (seen == seen[:1]).all():
            return Image.fromarray(opacity)
    ground = Image.new("RGBA", image.size, "white" if mode == "RGB" else "black")
    return Image.alpha_composite(ground, image).convert("RGB")


def _digest(pixels: NDArray[np.uint8]) -> str:
    return hashlib.sha256(f"{list(pixels.shape)}".encode() + pixels.tobytes()).hexdigest()
