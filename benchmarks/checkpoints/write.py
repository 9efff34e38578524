"""Write a Stable Diffusion checkpoint of random weights: with the sizes of the real one, but not its licence.

    python -m latentrt.benchmarks.checkpoints.write DIRECTORY [--kind KIND] [--size SIZE] [--tokenizer DIRECTORY]
        [--seed S]

The result is a diffusers directory that ``latentrt build-engine`` and other runtimes read. Its images are noise; its
latency and memory are those of a trained model.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from ..program import make_parser
from .sd3 import SIZES as SD3_SIZES
from .sd3 import write_sd3
from .sdxl import SIZES as SDXL_SIZES
from .sdxl import write_sdxl
from .stable_diffusion import CONFIGS, write_checkpoint

SIZES = {"sd": tuple(CONFIGS), "sdxl": SDXL_SIZES, "sd3": SD3_SIZES}
"""Sizes by kind, the real one first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write a checkpoint; returns the exit status."""
    parser = make_parser("checkpoints.write", __doc__, json_file=False)
    parser.add_argument("directory", type=Path, help="an empty or a new directory")
    parser.add_argument(
        "--kind",
        choices=SIZES,
        default="sd",
        help="Stable Diffusion 1.5 in fp32, XL or 3.5 medium in fp16 (default: %(default)s)",
    )
    parser.add_argument(
        "--size", metavar="SIZE", help=", ".join(f"for {kind} {' or '.join(sizes)}" for kind, sizes in SIZES.items())
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("examples/emoji/tokenizer"),
        help="directory of a CLIP tokenizer (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.directory.exists() and (not arguments.directory.is_dir() or any(arguments.directory.iterdir())):
        parser.error(f"{arguments.directory} is not empty; name an empty or a new directory")
    if not arguments.tokenizer.is_dir():
        parser.error(f"{arguments.tokenizer} is not there; name the directory of a CLIP tokenizer with --tokenizer")
    size = arguments.size or SIZES[arguments.kind][0]
    if size not in SIZES[arguments.kind]:
        parser.error(f"the size {size!r} is unknown; {arguments.kind} has {', '.join(SIZES[arguments.kind])}")
    writers = {"sd": write_checkpoint, "sdxl": write_sdxl, "sd3": write_sd3}
    writers[arguments.kind](arguments.directory, size, arguments.tokenizer, arguments.seed)
    written = sum(file.stat().st_size for file in arguments.directory.rglob("*") if file.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{arguments.directory}: {written / 1e9:.2f} GB written, {peak / 1e9:.2f} GB of memory at the peak")
    return 0


if __name__ == "__main__":
    sys.exit(main())
