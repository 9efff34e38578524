"""The training set: Noto Color Emoji pictures and English captions.

Pictures come from the font ``NotoColorEmoji.ttf`` (SIL Open Font License 1.1; Debian package
``fonts-noto-color-emoji``), names from the ``emoji`` package (Unicode CLDR short names). Nothing is
downloaded: both are installed from package registries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import emoji
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109
"""The only size at which the bitmap strikes of Noto Color Emoji can be drawn."""
SIZE = 64
"""Width and height of a picture in pixels."""
NEAR_DUPLICATE_MSE = 0.008
"""Pictures closer than this (RGB in [0, 1], averaged to 16x16) look the same at this size; one stays."""

_ZWJ, _VS16 = "\u200d", "\ufe0f"
_FLAG_LETTERS = re.compile("[\U0001f1e6-\U0001f1ff\U000e0020-\U000e007f]")
_EXCLUDED_NAMES = re.compile(
    r"flag|keycap|button|o.clock|-thirty|skin_tone|arrow|square|input_|banknote|^anger_symbol|kaaba|circled"
)


@dataclass(frozen=True)
class Picture:
    """One emoji: its characters, its plain English name and its pixels."""

    text: str
    name: str
    pixels: np.ndarray
    """uint8 ``[SIZE, SIZE, 3]`` on white."""

    @property
    def captions(self) -> tuple[str, ...]:
        """The ways in which the training set asks for this picture."""
        article = "an" if self.name[0] in "aeiou" else "a"
        return (
            self.name,
            f"{self.name} emoji",
            f"{article} {self.name}",
            f"{article} {self.name} emoji",
            f"a picture of {article} {self.name}",
            f"an emoji of {article} {self.name}",
        )


def draw(text: str) -> np.ndarray | None:
    """Draw an emoji on white, ``[SIZE, SIZE, 3]`` uint8; ``None`` where the font has no picture of it."""
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    canvas = Image.new("RGBA", (136, 128), (255, 255, 255, 0))
    if font.getlength(text) > 140:  # drawn as several glyphs: the font does not know the sequence
        return None
    ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
    alpha = np.asarray(canvas)[..., 3]
    if alpha.max() == 0:
        return None
    square = Image.new("RGB", (136, 136), (255, 255, 255))
    square.paste(canvas, (0, 4), canvas)
    return np.asarray(square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)).copy()


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Average RGB pictures to 16x16: ``[..., H, W, 3]`` in 0..255 to float32 ``[..., 768]`` in [0, 1]."""
    height, width = pixels.shape[-3], pixels.shape[-2]
    blocks = pixels.reshape(*pixels.shape[:-3], 16, height // 16, 16, width // 16, 3)
    means: np.ndarray = blocks.astype(np.float32).mean(axis=(-4, -2)) / 255
    return means.reshape(*pixels.shape[:-3], 768)


def load_pictures() -> list[Picture]:
    """All pictures of the training set, in the order of their code points.

    Left out: flags, keycaps, clock faces, lettered buttons, ZWJ sequences and skin tones, what the font
    lacks, and what looks the same as an earlier picture at this size.
    """
    kept: list[Picture] = []
    thumbs: list[np.ndarray] = []
    names: set[str] = set()
    for text, entry in sorted(emoji.EMOJI_DATA.items()):
        raw = entry["en"].strip(":")
        if entry["status"] != emoji.STATUS["fully_qualified"] or _ZWJ in text or _FLAG_LETTERS.search(text):
            continue
        if _EXCLUDED_NAMES.search(raw):
            continue
        name = re.sub(r"[^a-z0-9' -]+", " ", raw.lower().replace("_", " ").replace("\u2019", "'")).strip()
        if not name or name in names:
            continue
        pixels = draw(text.replace(_VS16, ""))
        if pixels is None:
            continue
        thumb = thumbnail(pixels)
        if thumbs and float(np.square(np.stack(thumbs) - thumb).mean(axis=1).min()) < NEAR_DUPLICATE_MSE:
            continue
        kept.append(Picture(text, name, pixels))
        thumbs.append(thumb)
        names.add(name)
    return kept
