"""Draw prompts with a bundle into one sheet and print the time of each stage.

python demo.py BUNDLE PROMPT... --output SHEET.png [--seed S] [--columns N] [--enlarge N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from latentrt.runtime import Pipeline, Result
from latentrt.runtime.images.png import sheet, write_png


def table(rows: Sequence[tuple[str, Result]]) -> str:
    """Milliseconds of each stage, a line for each image."""
    head = f"{'prompt':32} {'text encoder':>12} {'step (median)':>13} {'steps':>5} {'VAE decoder':>11} {'total':>8}"
    lines = [head, "-" * len(head)]
    for prompt, result in rows:
        timings = result.timings
        milliseconds = [1000 * value for value in (timings.text_encoder, median(timings.step))]
        lines.append(
            f"{prompt[:32]:32} {milliseconds[0]:9.1f} ms {milliseconds[1]:10.1f} ms {len(timings.step):5} "
            f"{1000 * timings.vae_decoder:8.1f} ms {1000 * timings.total:5.0f} ms"
        )
    return "\n".join(lines)


def main() -> None:
    """Draw every prompt once, with the bundle's defaults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path, help="directory that latentrt build-engine wrote")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a prompt; each gives an image")
    parser.add_argument("--output", type=Path, required=True, help="the PNG file of the sheet")
    parser.add_argument("--seed", type=int, default=0, help="seed of every image (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=4, help="images in a row (default: %(default)s)")
    parser.add_argument(
        "--enlarge", type=int, default=2, help="factor of the images' sides in the sheet (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with Pipeline.load(arguments.bundle) as pipe:
        rows = [(prompt, pipe(prompt, seed=arguments.seed)) for prompt in arguments.prompts]
    images = np.concatenate([result.images for _, result in rows])
    large = images.repeat(arguments.enlarge, axis=1).repeat(arguments.enlarge, axis=2)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_png(arguments.output, sheet(large, columns=arguments.columns))
    print(table(rows))
    print(f"\n{len(rows)} images in {arguments.output}")


if __name__ == "__main__":
    main()
