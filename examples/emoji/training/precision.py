"""What reduced precision costs the emoji model: pictures against fp32, and whether they still show what was asked for.

    python precision.py BUNDLE [--pictures 50] [--seed 0] [--steps 20] [--json FILE]

Every form of the bundle's denoiser is drawn with as its hardware would: all values are rounded to what they are, by
ONNX Runtime on a CPU. bf16 is also drawn as OpenVINO computes it, by lowering the fp32 graph. Captions, seeds and the
nearest neighbour are those of evaluate.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
from data import load_pictures, thumbnail

from latentrt.exporter.emulate import emulated
from latentrt.exporter.quality import picture_psnr, picture_ssim
from latentrt.exporter.targets import PORTABLE
from latentrt.runtime.bundle import Bundle

LOWERED = f"{PORTABLE.name}, lowered to bf16"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions, and of the first noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every picture")
    arguments = parser.parse_args()
    pictures = load_pictures()
    every = [(index, caption) for index, picture in enumerate(pictures) for caption in picture.captions]
    chosen = np.random.default_rng(arguments.seed).choice(len(every), arguments.pictures, replace=False)
    targets = np.array([every[i][0] for i in chosen])
    known = thumbnail(np.stack([picture.pixels for picture in pictures]))
    bundle = Bundle.open(arguments.bundle)
    forms = sorted(bundle.manifest.components["unet_step"].graphs, key=lambda form: form != PORTABLE.name)
    reference = np.zeros(0)
    rows = {}
    print(f"{'form':32} {'PSNR':>9} {'worst':>9} {'SSIM':>6} {'top 1':>6}")
    for name in (*forms, LOWERED):
        lowered = ir.DataType.BFLOAT16 if name == LOWERED else None
        form = PORTABLE.name if lowered else name
        with emulated(bundle, form, rounded=True, lowered=lowered) as (pipe, _):
            drawn = np.stack(
                [
                    pipe(every[i][1], steps=arguments.steps, seed=arguments.seed + row).images[0]
                    for row, i in enumerate(chosen)
                ]
            )
        if name == PORTABLE.name:
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
