"""Measure the emoji model: does it draw the emoji that was asked for, and how well does its autoencoder reconstruct?

    python evaluate.py BUNDLE [--captions 200] [--seed 0] [--steps 20] [--guidance G] [--sheet OUT.png] [--json]

Captions are drawn at random, without replacement, from all captions of the training set. The nearest neighbour is
searched among all training pictures, by the squared distance of RGB pictures averaged to 16x16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from data import Picture, load_pictures, thumbnail

from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.runtime import Pipeline
from latentrt.runtime.images.png import sheet, write_png


def reconstruction_psnr(bundle: Path, pipe: Pipeline, pictures: list[Picture]) -> float:
    """Mean PSNR in dB over all pictures, encoded to the posterior's mean and decoded."""
    latent = pipe.manifest.latent
    figures = []
    with OnnxRuntimeEngine(bundle / "vae_encoder" / "model.onnx", label="vae_encoder") as encoder:
        for start in range(0, len(pictures), 32):
            pixels = np.stack([picture.pixels for picture in pictures[start : start + 32]])
            sample = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
            parameters = encoder.run({"sample": sample})["latent_parameters"]
            drawn = pipe.decode(parameters[:, : latent.channels] * np.float32(latent.scaling))
            error = np.square(drawn.astype(np.float64) - pixels).mean(axis=(1, 2, 3))
            figures.append(10 * np.log10(255**2 / np.maximum(error, 1e-9)))
    return float(np.concatenate(figures).mean())


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions, and of the first noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="the bundle's default if left out")
    parser.add_argument("--sampler", default="dpmpp-2m")
    parser.add_argument("--sheet", type=Path, help="write the first 64 pictures here")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    pictures = load_pictures()
    every = [(index, caption) for index, picture in enumerate(pictures) for caption in picture.captions]
    chosen = np.random.default_rng(arguments.seed).choice(len(every), arguments.captions, replace=False)
    targets = np.array([every[i][0] for i in chosen])
    known = thumbnail(np.stack([picture.pixels for picture in pictures]))
    with Pipeline.load(arguments.bundle, "onnxruntime") as pipe:
        drawn = [
            pipe(
                every[i][1],
                steps=arguments.steps,
                guidance=arguments.guidance,
                sampler=arguments.sampler,
                seed=arguments.seed + row,
            ).images[0]
            for row, i in enumerate(chosen)
        ]
        psnr = reconstruction_psnr(arguments.bundle, pipe, pictures)
    distances = np.square(thumbnail(np.stack(drawn))[:, None] - known).sum(-1)
    nearest = distances.argsort(axis=1)
    figures = {
        "pictures": len(pictures),
        "captions": arguments.captions,
        "top_1": float((nearest[:, 0] == targets).mean()),
        "top_5": float((nearest[:, :5] == targets[:, None]).any(axis=1).mean()),
        "vae_psnr_db": psnr,
    }
    if arguments.sheet:
        write_png(arguments.sheet, sheet(np.stack(drawn[:64]), columns=16))
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        print("\n".join(f"{name:12} {value:.4g}" for name, value in figures.items()))
        wrong = [every[i][1] for i, row, target in zip(chosen, nearest, targets, strict=True) if row[0] != target]
        print("missed:", ", ".join(wrong))


if __name__ == "__main__":
    main()
