"""What reduced precision costs the emoji model: pictures against fp32, and whether they still show what was asked for.

    python precision.py BUNDLE [--pictures 50] [--seed 0] [--steps 20] [--engine ENGINE:PRECISION]... [--json FILE]

Every form of the bundle's denoiser is drawn with as its hardware would: all values are rounded to what they are, by
ONNX Runtime on a CPU. bf16 is also drawn as OpenVINO computes it, by lowering the fp32 graph. With --engine pictures
are drawn by engines themselves instead, and compared with those of ONNX Runtime in fp32. Captions, seeds and the
nearest neighbour are those of evaluate.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
from data import load_pictures, thumbnail

from latentrt.exporter.graphs.targets import PORTABLE
from latentrt.exporter.precision.quality import picture_psnr, picture_ssim
from latentrt.exporter.verification.emulate import emulated
from latentrt.runtime import Pipeline
from latentrt.runtime.bundle.reader import Bundle

LOWERED = f"{PORTABLE.name}, lowered to bf16"
REFERENCE = "onnxruntime:fp32"


@contextmanager
def drawing(bundle: Bundle, way: str) -> Iterator[Pipeline]:
    """A pipeline that draws in one way: with an engine, or as the hardware for a form would."""
    engine, colon, precision = way.partition(":")
    if colon:
        with Pipeline.load(bundle.path, engine, precision=precision, fixed_size=(None, None, 1)) as pipe:
            yield pipe
        return
    lowered = ir.DataType.BFLOAT16 if way == LOWERED else None
    with emulated(bundle, PORTABLE.name if lowered else way, rounded=True, lowered=lowered) as (pipe, _):
        yield pipe


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions, and of the first noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--engine", action="append", metavar="ENGINE:PRECISION", help="draw with it; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every picture")
    arguments = parser.parse_args()
    pictures = load_pictures()
    every = [(index, caption) for index, picture in enumerate(pictures) for caption in picture.captions]
    chosen = np.random.default_rng(arguments.seed).choice(len(every), arguments.pictures, replace=False)
    targets = np.array([every[i][0] for i in chosen])
    known = thumbnail(np.stack([picture.pixels for picture in pictures]))
    bundle = Bundle.open(arguments.bundle)
    forms = sorted(bundle.manifest.components["unet_step"].graphs, key=lambda form: form != PORTABLE.name)
    ways = [REFERENCE, *arguments.engine] if arguments.engine else [*forms, LOWERED]
    reference = np.zeros(0)
    rows = {}
    print(f"{'form':32} {'PSNR':>9} {'worst':>9} {'SSIM':>6} {'top 1':>6}")
    for name in ways:
        with drawing(bundle, name) as pipe:
            drawn = np.stack(
                [
                    pipe(every[i][1], steps=arguments.steps, seed=arguments.seed + row).images[0]
                    for row, i in enumerate(chosen)
                ]
            )
        if name == ways[0]:
            reference = drawn
        psnr = [picture_psnr(*pair) for pair in zip(reference, drawn, strict=True)]
        ssim = [picture_ssim(*pair) for pair in zip(reference, drawn, strict=True)]
        nearest = np.square(thumbnail(drawn)[:, None] - known).sum(-1).argmin(axis=1)
        right = float((nearest == targets).mean())
        rows[name] = {"psnr_db": psnr, "ssim": ssim, "top_1": right}
        print(f"{name:32} {np.mean(psnr):6.1f} dB {min(psnr):6.1f} dB {np.mean(ssim):6.3f} {right:6.0%}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
