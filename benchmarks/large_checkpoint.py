"""Write a large checkpoint of random weights in fp16, tensor by tensor: no model is ever held as a whole.

    python -m latentrt.benchmarks.large_checkpoint DIRECTORY [--size sd35-medium|tiny] [--tokenizer DIRECTORY]

What comes out is a diffusers directory of Stable Diffusion 3.5 medium's size, without T5. Its pictures are noise; time
to export, memory and latency are those of a trained model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SHARD_BYTES = 2 << 30
"""Bytes of weights that are held at a time, and that a file has."""

# https://huggingface.co/stabilityai/stable-diffusion-3.5-medium: the config.json of each part.
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sd35-medium": {
        "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "projection_dim": 768},
        "text_encoder_2": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
        "transformer": {
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    },
    "tiny": {
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "projection_dim": 16},
        "text_encoder_2": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "projection_dim": 24},
        "transformer": {
            "sample_size": 16,
            "num_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "caption_projection_dim": 32,
            "joint_attention_dim": 96,
            "pooled_projection_dim": 40,
            "pos_embed_max_size": 32,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        "vae": {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 32},
    },
}
_VAE = {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def write_weights(
    folder: Path, stem: str, build: Callable[[], Any], *, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write random fp16 weights for a model that is never allocated.

    Matrices are normal with the variance of one over their inputs, gains are one and biases zero, so that values stay
    in range through any number of layers.

    Args:
        folder: Where to; it exists.
        stem: Name of the files, without ending.
        build: Makes the model; it is called for its shapes alone.
        seed: Of the weights.
        shard_bytes: Most bytes in a file, unless one tensor has more.

    Returns:
        The number of weights.
    """
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        tensors = {}
        for name in names:
            shape = shapes[name]
            if len(shape) > 1:
                fan_in = torch.Size(shape[1:]).numel()
                # In rows, since even one matrix of fp32 may be large beside its fp16.
                whole = torch.empty(shape, dtype=torch.float16)
                for row in whole:
                    row.copy_(torch.randn(row.shape, generator=generator) * fan_in**-0.5)
                tensors[name] = whole
            else:
                value = 0.0 if name.endswith("bias") else 1.0
                tensors[name] = torch.full(shape, value, dtype=torch.float16)
            index[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def write_checkpoint(
    directory: Path, size: str, tokenizer: Path, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> dict[str, int]:
    """Write a diffusers directory of Stable Diffusion 3.5, without T5.

    Args:
        directory: Where to.
        size: A key of :data:`SIZES`.
        tokenizer: Directory of a CLIP tokenizer.
        seed: Of the weights.
        shard_bytes: See :func:`write_weights`.

    Returns:
        The number of weights of each part.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(tokenizer)
    parts, counts = SIZES[size], {}
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline"}
    special = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    for number, part in enumerate(("text_encoder", "text_encoder_2")):
        heads = {"num_attention_heads": 12 if size != "tiny" else 4}
        rows = 49408 if size != "tiny" else len(words)
        text = CLIPTextConfig(**{"vocab_size": rows, **heads, **special, **parts[part]})
        text.architectures = ["CLIPTextModelWithProjection"]
        (directory / part).mkdir(parents=True)
        text.save_pretrained(directory / part)
        counts[part] = write_weights(
            directory / part,
            "model",
            lambda text=text: CLIPTextModelWithProjection(text),
            seed=seed + number,
            shard_bytes=shard_bytes,
        )
        name = part.replace("text_encoder", "tokenizer")
        words.save_pretrained(directory / name)
        index |= {part: ["transformers", "CLIPTextModelWithProjection"], name: ["transformers", "CLIPTokenizer"]}
    blocks = len(parts["vae"]["block_out_channels"])
    levels = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    settings = {
        "transformer": (SD3Transformer2DModel, {"pooled_projection_dim": 2048, "joint_attention_dim": 4096}),
        "vae": (AutoencoderKL, {**_VAE, **levels}),
    }
    for number, (part, (kind, common)) in enumerate(settings.items(), 2):
        config = {**common, **parts[part]}
        (directory / part).mkdir()
        described = {"_class_name": kind.__name__, **config}
        (directory / part / "config.json").write_text(json.dumps(described, indent=2))
        counts[part] = write_weights(
            directory / part,
            "diffusion_pytorch_model",
            lambda kind=kind, config=config: kind(**config),
            seed=seed + number,
            shard_bytes=shard_bytes,
        )
        index[part] = ["diffusers", kind.__name__]
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(directory / "scheduler")
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m latentrt.benchmarks.large_checkpoint", description=__doc__.split("\n")[0]
    )
    parser.add_argument("directory", type=Path, help="an empty or a new directory")
    parser.add_argument("--size", choices=SIZES, default="sd35-medium")
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
    for part, count in write_checkpoint(
        arguments.directory, arguments.size, arguments.tokenizer, arguments.seed
    ).items():
        print(f"{part}: {count / 1e6:,.1f} M weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
