"""Command-line options for settings that a source does not have itself."""

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
        "--prediction",
        choices=PREDICTIONS,
        help="for a single file: the prediction of its denoiser, which not every file names",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="for a directory or a model on a hub: variant of the files of weights, such as fp16",
    )
    parser.add_argument("--revision", metavar="REV", help="for a model on a hub: branch, tag or commit")


def reading(arguments: argparse.Namespace) -> Reading:
    """The settings that a command line names."""
    return Reading(arguments.config, arguments.tokenizer, arguments.prediction, arguments.variant, arguments.revision)
