"""Options that say of a source what it does not say itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..source.opening import Reading
from ..source.single_file import PREDICTIONS


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help="for a single file: a diffusers directory whose configuration and tokenizers it goes with",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="for a single file: a folder of CLIP's tokenizer")
    parser.add_argument(
        "--prediction", choices=PREDICTIONS, help="for a single file: what its denoiser predicts, if it does not say"
    )
    parser.add_argument("--variant", metavar="NAME", help="which files of weights of a directory, such as fp16")
    parser.add_argument("--revision", metavar="REV", help="for a model on a hub: branch, tag or commit")


def reading(arguments: argparse.Namespace) -> Reading:
    """What was given of them."""
    return Reading(arguments.config, arguments.tokenizer, arguments.prediction, arguments.variant, arguments.revision)
