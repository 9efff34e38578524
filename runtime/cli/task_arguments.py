"""Arguments of ``latentrt generate`` for pictures to begin with, and what PNG text says of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ..images.reading import PictureRecord
from ..request.options import RESIZES

LABELS: Mapping[str, str] = {"strength": "Denoising strength", "variation_strength": "Variation seed strength"}
"""What the web UI calls options of which it has another name."""


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("--image", metavar="FILE", help="picture to begin with")
    parser.add_argument("--strength", type=float, metavar="S", help="how much of it to change, above 0 and up to 1")
    parser.add_argument("--resize", choices=RESIZES, help="for a picture of another shape: stretch it, or cut it out")
    parser.add_argument("--mask", metavar="FILE", help="picture of its size, white where it is painted anew")
    parser.add_argument("--mask-blur", type=float, metavar="PIXELS", help="radius by which to blur the mask")
    parser.add_argument(
        "--mask-padding", type=int, metavar="PIXELS", help="draw only what is around the mask, with a margin"
    )
    parser.add_argument(
        "--keep-outside",
        action="store_const",
        const=True,
        help="put the result into the picture through the mask, so that nothing outside of it changes",
    )
    parser.add_argument("--variation-seed", type=int, metavar="S", help="seed of noise to turn the seed's own towards")
    parser.add_argument("--variation-strength", type=float, metavar="V", help="how far, 0 to 1")


def record_text(record: PictureRecord) -> str:
    """A picture in PNG text: its file's name if it has one, and the beginning of its hash."""
    return f"{record.path or 'given'} {record.sha256[:12]}"
