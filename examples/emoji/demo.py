"""Draw prompts with a bundle into one sheet and print where the time went: ``demo.py BUNDLE PROMPT... --output X``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from latentrt.runtime import Pipeline, Result
from latentrt.runtime.images.png import sheet, write_png


def table(rows: Sequence[tuple[str, Result]]) -> str:
    """Milliseconds of each stage, a line for each picture."""
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
    """Draw every prompt once, at the bundle's defaults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--enlarge", type=int, default=2, help="pixels of the sheet for each pixel of a picture")
    arguments = parser.parse_args()
    with Pipeline.load(arguments.bundle) as pipe:
        rows = [(prompt, pipe(prompt, seed=arguments.seed)) for prompt in arguments.prompts]
    pictures = np.concatenate([result.images for _, result in rows])
    large = pictures.repeat(arguments.enlarge, axis=1).repeat(arguments.enlarge, axis=2)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_png(arguments.output, sheet(large, columns=arguments.columns))
    print(table(rows))
    print(f"\n{len(rows)} pictures in {arguments.output}")


if __name__ == "__main__":
    main()
