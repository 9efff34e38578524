"""Images in every form are read alike, against Pillow's writers, numpy's arithmetic and the PNG specification."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.images import reading as pictures
from latentrt.runtime.images.reading import PictureRecord, read_picture, read_pictures

SHAPE = (12, 20, 3)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape or SHAPE, dtype=np.uint8)


def smooth() -> np.ndarray:
    rows, columns = np.mgrid[:48, :64]
    return np.stack([rows * 5, columns * 3, rows + columns], axis=2).astype(np.uint8)


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int = 8, kind: int = 2, data: bytes = b"") -> bytes:
    """A PNG file from its header's values and its pixels, which may be missing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_a_picture_is_the_same_in_every_form(tmp_path: Path) -> None:
    """A file, its name, its content, a Pillow image, and arrays of bytes and of floats give the same pixels."""
    pixels = noise()
    path = tmp_path / "picture.png"
    path.write_bytes(saved(pixels))
    forms = [str(path), path, path.read_bytes(), Image.fromarray(pixels), Image.open(path), pixels, pixels / 255]
    for form in forms:
        found = read_picture(form, "image")
        assert found.pixels.dtype == np.uint8
        np.testing.assert_array_equal(found.pixels, pixels)
    assert (found.width, found.height) == (20, 12)


def test_a_record_names_the_file_and_its_hash(tmp_path: Path) -> None:
    """Of a file its name and the hash of its bytes are kept; of pixels, a hash that their shape decides too."""
    path = tmp_path / "picture.png"
    path.write_bytes(saved(noise()))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_picture(str(path), "image").record == PictureRecord(expected, str(path))
    assert read_picture(path.read_bytes(), "image").record == PictureRecord(expected, None)
    one, other = (read_picture(np.zeros(shape, np.uint8), "image").record for shape in ((2, 4, 3), (4, 2, 3)))
    assert one.path is None
    assert one.sha256 != other.sha256
    assert one == read_picture(np.zeros((2, 4, 3), np.uint8), "image").record


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_upright(orientation: int) -> None:
    """What EXIF says of a photo's rotation is done, for all eight ways to hold a camera."""
    back = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = noise()
    stored = saved(np.ascontiguousarray(back[orientation](upright)), "PNG", exif=exif)
    np.testing.assert_array_equal(read_picture(stored, "image").pixels, upright)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "BMP", "PPM"])
def test_common_formats_are_read(kind: str) -> None:
    """Files of the common formats look as they should."""
    found = read_picture(saved(smooth(), kind), "image").pixels.astype(int)
    assert np.abs(found - smooth()).mean() < 3


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBA", "LA", "PA"])
def test_every_mode_of_pillow_becomes_rgb(mode: str) -> None:
    """Whatever a Pillow image's mode, it gives what Pillow converts it to."""
    image = Image.fromarray(smooth())
    image = image.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (64, 48))
    expected = np.asarray(image.convert("RGBA").convert("RGB") if mode in ("PA", "LA") else image.convert("RGB"))
    np.testing.assert_array_equal(read_picture(image, "image").pixels, expected)


def test_a_cmyk_photo_keeps_its_colours() -> None:
    """A JPEG in CMYK is neither refused nor inverted."""
    found = read_picture(saved(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=95), "image").pixels
    assert np.abs(found.astype(int) - smooth()).mean() < 5


def test_sixteen_bits_are_scaled() -> None:
    """16 bits of grey or of colour become 8 by scaling, not by cutting off."""
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    expected = np.round(values / 257)
    found = read_picture(saved(Image.fromarray(values)), "image").pixels
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=2))
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    found = read_picture(png(8, 8, depth=16, data=rows), "image").pixels
    assert np.abs(found.astype(int) - expected[..., None]).max() <= 1
    with pytest.raises(InvalidRequestError, match="at most 16 bits"):
        read_picture(Image.fromarray(np.full((4, 4), 70000, np.int32)), "image")


def test_transparency_is_laid_over_white() -> None:
    """Where a picture is transparent it is white, and half of it where it is half so."""
    colours = np.zeros((2, 3, 4), np.uint8)
    colours[..., 0], colours[..., 3] = 200, [0, 128, 255]
    found = read_picture(saved(colours), "image").pixels
    np.testing.assert_array_equal(found[0, 0], [255, 255, 255])
    np.testing.assert_allclose(found[0, 1], [227, 127, 127], atol=1)
    np.testing.assert_array_equal(found[0, 2], [200, 0, 0])


def test_a_palette_with_a_transparent_entry_is_laid_over_white() -> None:
    """A PNG that makes one colour of its palette transparent is white there."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    found = read_picture(saved(image, transparency=0), "image").pixels
    np.testing.assert_array_equal(found, [[[255, 255, 255], [40, 50, 60]]])


def test_the_mask_of_a_picture_is_its_luminance() -> None:
    """A mask in colours is what Pillow makes of it in grey; one of bools is black and white."""
    expected = np.asarray(Image.fromarray(smooth()).convert("L"))
    np.testing.assert_array_equal(read_picture(saved(smooth()), "mask", "L").pixels, expected)
    np.testing.assert_array_equal(read_picture(np.eye(3, dtype=bool), "mask", "L").pixels, np.eye(3) * 255)
    np.testing.assert_array_equal(read_picture(expected[..., None], "mask", "L").pixels, expected)


@pytest.mark.parametrize("colour", [0, 90, 255])
def test_a_mask_on_an_empty_layer_is_its_opacity(colour: int) -> None:
    """Strokes of one colour on a transparent layer are a mask whatever that colour is."""
    opacity = np.array([[0, 128, 255, 255]], np.uint8)
    drawn = np.dstack([np.full((1, 4, 3), colour, np.uint8), opacity])
    drawn[opacity == 0] = 7  # nobody sees it
    drawn[opacity == 0, 3] = 0
    np.testing.assert_array_equal(read_picture(drawn, "mask", "L").pixels, opacity)


def test_a_mask_in_black_and_white_with_transparency_is_black_there() -> None:
    """Transparent places of a mask that has both black and white are not painted."""
    drawn = np.array([[[0, 0, 0, 255], [255, 255, 255, 255], [255, 255, 255, 0]]], np.uint8)
    np.testing.assert_array_equal(read_picture(drawn, "mask", "L").pixels, [[0, 255, 0]])
    opaque = np.full((2, 2, 4), 255, np.uint8)
    opaque[..., :3] = 0
    np.testing.assert_array_equal(read_picture(opaque, "mask", "L").pixels, np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (png(60_000, 60_000), "image has far more than"),
        (png(60_000, 1000), "image is 60000x1000, expected sides of at most 16,384"),
        (png(9000, 8000), "image is 9000x8000"),
        (png(0, 5), "cannot read image"),
        (saved(smooth(), "JPEG")[:-200], "cannot read image: it is broken, or none of PNG, JPEG"),
        (saved(noise(200, 200, 3))[:-9000], "cannot read image: it is broken"),
        (saved(smooth())[:20], "cannot read image: it is broken"),
        (b"", "cannot read image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "cannot read image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot read image"),
        (np.full(SHAPE, np.nan), "image has floats from nan to nan, expected 0 to 1"),
        (np.full(SHAPE, 1.5, np.float32), "image has floats from 1.5 to 1.5"),
        (np.full(SHAPE, np.inf), "image has floats from inf to inf"),
        (np.zeros((3, 12, 20), np.uint8), r"image has the shape \[3, 12, 20\], expected \[height, width, 3\]"),
        (np.zeros((2, 12, 20, 3), np.uint8), r"image has the shape \[2, 12, 20, 3\]"),
        (np.zeros((0, 20, 3), np.uint8), "image is 20x0, expected at least one pixel"),
        (np.broadcast_to(np.uint8(0), (60_000, 60_000, 3)), "image is 60000x60000"),
        (np.zeros(SHAPE, np.int64), "image is an array of int64, expected uint8"),
        (np.zeros(SHAPE, object), "image is an array of object"),
        (Image.new("RGB", (0, 4)), "image is 0x4, expected at least one pixel"),
        (7, "image is a int, expected a file"),
        (None, "image is a NoneType"),
        ([noise()], "image is a list"),
        (b"no such file".decode(), "cannot read image from 'no such file': No such file or directory"),
        ("nul\0", "cannot read image from"),
        (".", "image is '.', which is no file"),
        (os.devnull, "which is no file; give the name of an image"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence(given: Any, message: str) -> None:
    """Pictures that are broken, huge, or none at all are refused by name."""
    with pytest.raises(InvalidRequestError, match=message) as caught:
        read_picture(given, "image")
    assert "\n" not in str(caught.value)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    """A named pipe that nobody writes to does not hold a request up."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InvalidRequestError, match="which is no file"):
        read_picture(pipe, "image")


def test_a_huge_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of more bytes than any sensible picture is refused."""
    monkeypatch.setattr(pictures, "MAX_BYTES", 2**20)
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(InvalidRequestError, match="a file of more than 1 MiB"):
        read_picture(path, "image")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it finds odd and goes on with
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_a_file_with_any_byte_changed_is_read_or_refused(kind: str) -> None:
    """A file that somebody has tampered with gives pixels or one clear error, whatever was changed."""
    content, random = saved(smooth(), kind), np.random.default_rng(1)
    for _ in range(100):
        changed = bytearray(content)
        for place in random.integers(0, min(len(changed), 400), 3):
            changed[place] = random.integers(256)
        try:
            found = read_picture(bytes(changed), "image").pixels
        except InvalidRequestError:
            continue
        assert found.ndim == 3


def test_several_pictures_are_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list or an array of pictures gives each; none, or different sizes, are refused."""
    pixels = noise(2, *SHAPE)
    for given in (pixels, [pixels[0], saved(pixels[1])], (pixels[0], Image.fromarray(pixels[1]))):
        np.testing.assert_array_equal([each.pixels for each in read_pictures(given, "image")], pixels)
    (single,) = read_pictures(pixels[0], "image")
    np.testing.assert_array_equal(single.pixels, pixels[0])
    with pytest.raises(InvalidRequestError, match=r"image\[1\] is 12x20 and image\[0\] 20x12"):
        read_pictures([pixels[0], pixels[0].swapaxes(0, 1)], "image")
    with pytest.raises(InvalidRequestError, match="image is empty"):
        read_pictures([], "image")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(InvalidRequestError, match="image has 1,200 pixels or more, expected at most 1,000 together"):
        read_pictures([noise(20, 20, 3)] * 4, "image")
