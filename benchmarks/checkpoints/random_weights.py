"""Random weights in fp16, drawn and written tensor by tensor, so that memory holds neither an fp32 copy nor a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1 << 30
"""Most bytes of weights that are held at a time; a file has no more."""


def write_weights(folder: Path, stem: str, model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw a model's weights and write them, one shard in memory at a time.

    Args:
        folder: The folder for the files; it exists.
        stem: Name of the files, without suffix.
        model: The model that gives names and shapes of the tensors; it may be on torch's meta device.
        generator: The generator that weights are drawn from.
    """
    from safetensors.torch import save_file

    shards = list(_shards({name: tensor.shape for name, tensor in model.state_dict().items()}))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        tensors = {name: _drawn(name, shape, generator) for name, shape in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(shapes: Mapping[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    shard: dict[str, torch.Size] = {}
    for name, shape in shapes.items():
        if shard and 2 * sum(map(math.prod, [*shard.values(), shape])) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A weight of about the magnitude that its class would draw, so that activations stay within fp16."""
    import torch

    if len(shape) < 2:  # normalisations begin at one; biases, and all else of one dimension, at zero
        return torch.full(shape, float("norm" in name and name.endswith("weight")), dtype=torch.float16)
    width = 0.02 if "embedding" in name and "linear" not in name else 1 / math.sqrt(3 * math.prod(shape[1:]))
    return torch.randn(shape, generator=generator).mul_(width).to(torch.float16)
