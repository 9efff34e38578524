"""PNG files, against Pillow's reader, the specification's chunk layout, and the operating system's own refusals."""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from latentrt.engines.errors import InvalidRequestError, OutputError
from latentrt.runtime.images.png import GenerationParameters, read_parameters, sheet, write_png

LATIN = "a red apple, café\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7"
WIDE = "ein roter Apfel 🍎, 苹果\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 7"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def chunks(path: Path) -> list[tuple[bytes, bytes]]:
    """Types and contents of a PNG file's chunks, their checksums verified."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found = []
    position = 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, content = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        assert checksum == zlib.crc32(kind + content)
        found.append((kind, content))
        position += 12 + length
    return found


def parameters(**changes: Any) -> GenerationParameters:
    values: dict[str, Any] = {
        "prompt": "a red apple",
        "negative_prompt": "blurry",
        "steps": 20,
        "sampler": "dpmpp-2m",
        "guidance": 7.5,
        "seed": 7,
        "width": 64,
        "height": 48,
        "model": "emoji",
        "program": "latentrt 0.1",
    }
    return GenerationParameters(**{**values, **changes})


def test_pixels_survive(tmp_path: Path) -> None:
    """Another reader gets back every pixel of an oblong picture, also of one that is a view."""
    for pixels in (noise(48, 64, 3), noise(64, 48, 3).transpose(1, 0, 2), noise(1, 1, 3), noise(8, 8, 3)[::-1, ::2]):
        write_png(tmp_path / "out.png", pixels, LATIN)
        with Image.open(tmp_path / "out.png") as image:
            assert image.format == "PNG"
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), pixels)


def test_latin_text_is_a_text_chunk_before_the_pixels(tmp_path: Path) -> None:
    """Text that Latin-1 holds is an uncompressed tEXt chunk, which every reader knows."""
    write_png(tmp_path / "out.png", noise(4, 4, 3), LATIN)
    kinds = dict(chunks(tmp_path / "out.png"))
    assert kinds[b"tEXt"] == b"parameters\0" + LATIN.encode("latin-1")
    assert list(kinds).index(b"tEXt") < list(kinds).index(b"IDAT")


def test_other_text_is_international_text(tmp_path: Path) -> None:
    """Text beyond Latin-1 is an uncompressed iTXt chunk in UTF-8."""
    write_png(tmp_path / "out.png", noise(4, 4, 3), WIDE)
    assert dict(chunks(tmp_path / "out.png"))[b"iTXt"] == b"parameters\0\0\0\0\0" + WIDE.encode("utf-8")


@pytest.mark.parametrize("text", [LATIN, WIDE, "", "one\n\ntwo\ttabs  spaces ", "x" * 300_000])
def test_text_survives(tmp_path: Path, text: str) -> None:
    """What is written is read back, by us and by Pillow alone."""
    write_png(tmp_path / "out.png", noise(4, 4, 3), text)
    assert read_parameters(tmp_path / "out.png") == text
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["parameters"] == text


def test_no_text_is_no_chunk(tmp_path: Path) -> None:
    """Without parameters the file has none."""
    write_png(str(tmp_path / "out.png"), noise(4, 4, 3))
    assert {kind for kind, _ in chunks(tmp_path / "out.png")} == {b"IHDR", b"IDAT", b"IEND"}
    assert read_parameters(str(tmp_path / "out.png")) is None


def test_nul_is_replaced(tmp_path: Path) -> None:
    """NUL ends a keyword in PNG and may not stand in text."""
    write_png(tmp_path / "out.png", noise(4, 4, 3), "a\0b")
    assert read_parameters(tmp_path / "out.png") == "a\ufffdb"


def test_text_after_the_pixels_is_read(tmp_path: Path) -> None:
    """A tool may have moved the chunk behind the pixels."""
    write_png(tmp_path / "plain.png", noise(4, 4, 3))
    data = (tmp_path / "plain.png").read_bytes()
    body = b"tEXt" + b"parameters\0moved"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "moved.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert read_parameters(tmp_path / "moved.png") == "moved"


def test_the_text_has_the_web_uis_form() -> None:
    """Prompt, negative prompt, and one line of entries, in the web UI's words and order."""
    assert parameters().to_text() == (
        "a red apple\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 64x48, Model: emoji, RNG: CPU, "
        "Version: latentrt 0.1"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"negative_prompt": ""}, r"\Aa red apple\nSteps: 20, "),
        ({"prompt": "", "negative_prompt": ""}, r"\ASteps: 20, "),
        ({"prompt": "two\nlines"}, r"\Atwo\nlines\nNegative prompt: blurry\nSteps"),
        ({"guidance": 7.0}, r"CFG scale: 7, Seed"),
        ({"guidance": 1}, r"CFG scale: 1, Seed"),
        ({"sampler": "euler-a"}, r"Sampler: Euler a, "),
        ({"sampler": "of-tomorrow"}, r"Sampler: of-tomorrow, "),
        ({"seed": 2**64 - 1}, r"Seed: 18446744073709551615, "),
        ({"model": 'my "best", v1: final'}, r'Model: "my \\"best\\", v1: final", RNG'),
        (
            {"extra": {"Clip skip": 2, "Engine": "onnxruntime"}},
            r"RNG: CPU, Clip skip: 2, Engine: onnxruntime, Version: ",
        ),
    ],
)
def test_entries_follow_the_web_uis_rules(changes: dict[str, Any], expected: str) -> None:
    """Empty parts are left out, whole numbers are short, and values with separators are quoted as JSON."""
    assert re.search(expected, parameters(**changes).to_text())


def test_the_version_is_the_installed_one() -> None:
    """Unless told otherwise, the text names this package and its version."""
    made = GenerationParameters("a", "", 1, "euler", 1.0, 0, 8, 8, "m")
    assert re.search(r", Version: latentrt \d+\.\d+[^,]*\Z", made.to_text())


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        [[[0, 0, 0]]],
    ],
)
def test_other_pixels_are_refused(tmp_path: Path, pixels: Any) -> None:
    """A wrong dtype, layout or kind is an InvalidRequestError, and no file appears."""
    with pytest.raises(InvalidRequestError, match="pixels"):
        write_png(tmp_path / "out.png", pixels, None)
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogates_in_the_text_are_refused(tmp_path: Path) -> None:
    """Text that UTF-8 cannot hold is an InvalidRequestError, and no file appears."""
    with pytest.raises(InvalidRequestError, match="surrogate"):
        write_png(tmp_path / "out.png", noise(4, 4, 3), "a \ud800")
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    """The new picture takes the old one's name, with the permissions of any new file, and leaves nothing beside it."""
    (tmp_path / "out.png").write_bytes(b"old")
    (tmp_path / "usual").touch()
    write_png(tmp_path / "out.png", noise(4, 4, 3), None)
    assert read_parameters(tmp_path / "out.png") is None
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.png", "usual"]
    assert stat.S_IMODE((tmp_path / "out.png").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    """The file that a link names is replaced, and the link stays a link."""
    (tmp_path / "place").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "place" / "real.png")
    write_png(tmp_path / "link.png", noise(4, 4, 3), "kept")
    assert (tmp_path / "link.png").is_symlink()
    assert read_parameters(tmp_path / "place" / "real.png") == "kept"


def test_a_name_of_the_greatest_length_is_written(tmp_path: Path) -> None:
    """The temporary file's name does not grow with the target's."""
    name = "x" * 251 + ".png"
    write_png(tmp_path / name, noise(4, 4, 3), None)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_readers_never_see_half_a_picture(tmp_path: Path) -> None:
    """While a file is replaced again and again, it is at every moment one of the whole pictures."""
    path = tmp_path / "out.png"
    write_png(path, noise(64, 64, 3), "0")
    stop = threading.Event()

    def rewrite() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            write_png(path, noise(64, 64, 3), str(number))

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        seen: set[bytes] = set()
        deadline = time.monotonic() + 30
        while len(seen) < 20 and time.monotonic() < deadline:
            seen.add(dict(chunks(path))[b"tEXt"])
    finally:
        stop.set()
        writer.join()
    assert len(seen) == 20


def assert_nothing_written(path: Path, match: str) -> None:
    """Writing to ``path`` fails in one sentence, and its directory is as it was."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    content = path.read_bytes() if path.is_file() else None
    with pytest.raises(OutputError, match=match) as caught:
        write_png(path, noise(128, 128, 3), LATIN)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert (sorted(path.parent.iterdir()) if path.parent.is_dir() else None) == before
    assert (path.read_bytes() if path.is_file() else None) == content


def test_a_missing_directory_is_an_output_error(tmp_path: Path) -> None:
    """The directory that is missing is named."""
    assert_nothing_written(tmp_path / "none" / "out.png", match="no directory")


def test_a_directory_as_target_is_an_output_error(tmp_path: Path) -> None:
    """A directory is not replaced by a picture."""
    (tmp_path / "out.png").mkdir()
    assert_nothing_written(tmp_path / "out.png", match="directory")


def test_a_file_as_directory_is_an_output_error(tmp_path: Path) -> None:
    """A path below a file cannot be written."""
    (tmp_path / "file").touch()
    assert_nothing_written(tmp_path / "file" / "out.png", match="directory")


def test_a_pipe_as_target_is_an_output_error(tmp_path: Path) -> None:
    """What is neither file nor directory is left alone instead of being renamed away."""
    os.mkfifo(tmp_path / "out.png")
    assert_nothing_written(tmp_path / "out.png", match="pipe")
    assert stat.S_ISFIFO((tmp_path / "out.png").stat().st_mode)


def test_a_loop_of_links_is_an_output_error(tmp_path: Path) -> None:
    """Links that lead nowhere end in the same sentence, and not in a replaced link."""
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert_nothing_written(tmp_path / "a.png", match=r"a\.png")
    assert (tmp_path / "a.png").is_symlink()


def test_impossible_names_are_output_errors(tmp_path: Path) -> None:
    """A name with NUL or beyond the file system's length is refused in one sentence."""
    for name in ("a\0b.png", "x" * 300 + ".png"):
        with pytest.raises(OutputError):
            write_png(tmp_path / name, noise(4, 4, 3), None)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_writing_is_an_output_error() -> None:
    """A directory in which nobody can create files, not even root, ends in one sentence."""
    if not Path("/proc/self").is_dir():
        pytest.skip("needs procfs")
    with pytest.raises(OutputError, match=r"cannot write /proc/self/out\.png"):
        write_png("/proc/self/out.png", noise(4, 4, 3), None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_an_output_error(tmp_path: Path) -> None:
    """A read-only directory ends in one sentence."""
    (tmp_path / "closed").mkdir(mode=0o500)
    assert_nothing_written(tmp_path / "closed" / "out.png", match="Permission denied")


# In a process of its own: the limit holds for every file, and pytest's own output may go to one.
CUT_OFF = """
import resource, sys
import numpy as np
from latentrt.runtime.images.png import write_png
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
try:
    write_png(sys.argv[1], pixels, None)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("older", [None, b"an older picture"])
def test_a_write_that_the_system_cuts_off_is_an_output_error(tmp_path: Path, older: bytes | None) -> None:
    """A real failure in the middle of writing removes the temporary file and keeps an older picture."""
    target = tmp_path / "out.png"
    if older is not None:
        target.write_bytes(older)
    process = subprocess.run(
        [sys.executable, "-c", CUT_OFF, str(target)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert process.returncode == 1
    assert re.fullmatch(r"OutputError: .*File too large.*\n", process.stderr)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if older is None else [older])


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    """On a file system of 16 KiB, a picture that does not fit leaves nothing, and one that fits is written."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "latentrt-test", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        assert_nothing_written(tmp_path / "out.png", match="No space left")
        write_png(tmp_path / "out.png", noise(8, 8, 3), LATIN)
        assert read_parameters(tmp_path / "out.png") == LATIN
        assert_nothing_written(tmp_path / "out.png", match="No space left")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_late_failure_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A disk that turns out full at fsync, or a rename that fails, removes the temporary file."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner: object = os if step == "fsync" else Path
    monkeypatch.setattr(owner, step, fail)
    (tmp_path / "out.png").write_bytes(b"an older picture")
    assert_nothing_written(tmp_path / "out.png", match="No space left")


def test_an_interruption_removes_the_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the disk is slow passes through and leaves nothing behind."""

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_png(tmp_path / "out.png", noise(4, 4, 3), None)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """A missing, foreign, empty or cut off file is an InvalidRequestError that names it."""
    write_png(tmp_path / "whole.png", noise(32, 32, 3))
    whole = (tmp_path / "whole.png").read_bytes()
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "photo.jpg")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    for length in (4, 20, 40, len(whole) // 2):
        (tmp_path / f"cut-{length}.png").write_bytes(whole[:length])
    (tmp_path / "folder").mkdir()
    for name in ["missing.png", "photo.jpg", "empty.png", "text.png", "folder", *map(str, tmp_path.glob("cut-*.png"))]:
        with pytest.raises(InvalidRequestError, match=re.escape(Path(name).name)):
            read_parameters(tmp_path / name)


def test_damaged_files_never_raise_anything_else(tmp_path: Path) -> None:
    """Bytes changed at random anywhere give a text, none, or an InvalidRequestError."""
    write_png(tmp_path / "whole.png", noise(8, 8, 3), WIDE)
    whole = (tmp_path / "whole.png").read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(8, len(whole), 3):
            damaged[position] = rng.integers(256)
        (tmp_path / "damaged.png").write_bytes(damaged)
        try:
            text = read_parameters(tmp_path / "damaged.png")
        except InvalidRequestError:
            refused += 1
        else:
            assert text is None or isinstance(text, str)
    assert refused


def test_text_of_other_tools_is_read(tmp_path: Path) -> None:
    """Compressed chunks, which we do not write, are read too."""
    for number, international in enumerate((False, True)):
        info = PngImagePlugin.PngInfo()
        if international:
            info.add_itxt("parameters", WIDE, zip=True)
        else:
            info.add_text("parameters", LATIN, zip=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png", pnginfo=info)
    assert read_parameters(tmp_path / "0.png") == LATIN
    assert read_parameters(tmp_path / "1.png") == WIDE


def test_a_sheet_lays_pictures_out_row_by_row() -> None:
    """Five pictures in two columns with gaps of 3 stand where rows and columns say, and the rest is white."""
    images = noise(5, 4, 6, 3)
    whole = sheet(images, columns=2, gap=3)
    assert whole.shape == (3 * 4 + 2 * 3, 2 * 6 + 3, 3)
    assert whole.dtype == np.uint8
    expected = Image.new("RGB", (15, 18), "white")
    for index, image in enumerate(images):
        expected.paste(Image.fromarray(image), ((index % 2) * 9, (index // 2) * 7))
    np.testing.assert_array_equal(whole, np.asarray(expected))


@pytest.mark.parametrize(
    ("number", "columns", "shape"), [(1, 1, (4, 6)), (3, 8, (4, 18)), (4, 2, (8, 12)), (3, 1, (12, 6))]
)
def test_a_sheet_is_as_large_as_its_pictures(number: int, columns: int, shape: tuple[int, int]) -> None:
    """Without gaps, a sheet holds exactly its pictures, and columns that would stay empty are left out."""
    images = noise(number, 4, 6, 3)
    whole = sheet(images, columns)
    assert whole.shape == (*shape, 3)
    np.testing.assert_array_equal(whole[:4, :6], images[0])
    np.testing.assert_array_equal(whole[-4:, -6:], images[-1])


@pytest.mark.parametrize(
    ("images", "columns", "gap"),
    [
        (noise(4, 4, 3), 1, 0),
        (noise(0, 4, 4, 3), 1, 0),
        (np.zeros((1, 4, 4, 3), np.float32), 1, 0),
        (noise(1, 4, 4, 3), 0, 0),
        (noise(1, 4, 4, 3), 1, -1),
    ],
)
def test_impossible_sheets_are_refused(images: np.ndarray, columns: int, gap: int) -> None:
    """No pictures, another layout, no columns or a negative gap is an InvalidRequestError."""
    with pytest.raises(InvalidRequestError):
        sheet(images, columns, gap)
