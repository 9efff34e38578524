"""Write a Stable Diffusion checkpoint of random weights: the sizes of the real one, and none of its licence.

    python -m latentrt.benchmarks.checkpoints.stable_diffusion DIRECTORY [--kind KIND] [--size SIZE] [--tokenizer
    DIRECTORY] [--seed S]

What comes out is a diffusers directory that ``latentrt build-engine`` and other runtimes take. Its pictures are noise;
its latency and memory are those of a trained model.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .sd3 import SIZES as SD3_SIZES
from .sd3 import write_sd3
from .sdxl import SIZES as SDXL_SIZES
from .sdxl import write_sdxl

# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5: text_encoder/config.json, vae/config.json and
# scheduler/scheduler_config.json.
_SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}


CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "tiny": _SD15
    | {
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
    },
}

_TEXT: dict[str, dict[str, Any]] = {
    "sd15": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
    },
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
_VAE: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
    "tiny": {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 32},
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}


def write_checkpoint(directory: Path, size: str, tokenizer: Path, seed: int = 0) -> None:
    """Write a diffusers directory of fp32 safetensors.

    Args:
        directory: Where to.
        size: A key of :data:`~latentrt.benchmarks.checkpoints.stable_diffusion.CONFIGS`.
        tokenizer: Directory of a CLIP tokenizer.
        seed: Of the weights, which are drawn as each class initialises them.
    """
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    blocks = len(_VAE[size]["block_out_channels"])
    text = CLIPTextConfig(
        **{"vocab_size": len(words), **_TEXT[size]},
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            **_VAE[size],
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet2DConditionModel(**CONFIGS[size]),
        scheduler=PNDMScheduler(**_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory, safe_serialization=True)


SIZES = {"sd": tuple(CONFIGS), "sdxl": SDXL_SIZES, "sd3": SD3_SIZES}
"""Sizes by kind, the real one first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m latentrt.benchmarks.checkpoints.stable_diffusion", description=__doc__.split("\n")[0]
    )
    parser.add_argument("directory", type=Path, help="an empty or a new directory")
    parser.add_argument(
        "--kind", choices=SIZES, default="sd", help="Stable Diffusion 1.5 in fp32, XL or 3.5 medium in fp16"
    )
    parser.add_argument(
        "--size", metavar="SIZE", help=", ".join(f"of {kind} {' or '.join(sizes)}" for kind, sizes in SIZES.items())
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("examples/emoji/tokenizer"),
        help="directory of a CLIP tokenizer (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
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


# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/blob/main/unet/config.json; what is not named
# here has diffusers' default.
