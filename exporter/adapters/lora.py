"""LoRAs that are fused into the weights of a model before it is exported: nothing of them is left at run time."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from latentrt.runtime.bundle import manifest as m
from latentrt.runtime.lora import reading as lora
from latentrt.runtime.lora.reading import LoraFile

from ..components import Adapter
from ..source.source import Source
from ..source.weights import empty_module
from .base import AdapterFiles, Option


@dataclass(frozen=True)
class LoraFiles(AdapterFiles):
    """LoRAs to fuse.

    Attributes:
        files: Files with their scales; they are added one after the other.
    """

    title: ClassVar[str] = "a LoRA"
    options: ClassVar[tuple[Option, ...]] = (
        Option("--lora", "FILE[:SCALE]", "LoRA in safetensors, fused into the weights; may be repeated", repeated=True),
    )
    files: tuple[LoraFile, ...]

    @classmethod
    def parse(cls, values: Mapping[str, Sequence[str]]) -> Self | None:
        """One file and scale for each value."""
        files = tuple(map(LoraFile.parse, values.get("lora", ())))
        return cls(files) if files else None

    def open(self, source: Source) -> Loras:
        """Read every file, and hold its layers against those of the source."""
        shapes = functools.partial(_shapes, source)
        target = lora.Target(source.name, source.family.denoiser, source.configs.keys(), shapes)
        return Loras(tuple(lora.read_lora(target, file) for file in self.files))


@dataclass(frozen=True)
class Loras(Adapter):
    """LoRAs that fit a source.

    Attributes:
        contents: Contents of each file: factors by part and layer, and the scale.
    """

    contents: tuple[lora.Lora, ...]

    @property
    def records(self) -> tuple[m.Adapter, ...]:
        """Name, hash and scale of every file."""
        return tuple(m.Adapter(each.name, each.applied.sha256, each.applied.scale) for each in self.contents)

    @property
    def fingerprint(self) -> str:
        """Hash and scale of every file."""
        return "".join(f"\0{record.sha256}\0{record.scale!r}" for record in self.records)

    @property
    def fuses(self) -> tuple[str, ...]:
        """Parts that a file has factors for."""
        return tuple(dict.fromkeys(part for each in self.contents for part in each.factors))

    def fuse(self, part: str, module: nn.Module) -> None:
        """Add each LoRA's product of factors to the weights.

        Raises:
            SourceError: if a weight is not finite afterwards.
        """
        for each in self.contents:
            for path in each.factors.get(part, {}):
                layer: Any = module.get_submodule(path)
                fused = layer.weight.detach().clone(memory_format=torch.contiguous_format)
                each.add_to(part, path, fused.numpy())
                layer.weight = nn.Parameter(fused, requires_grad=False)


def _shapes(source: Source, part: str) -> lora.Shapes:
    """Shapes of the weights that a LoRA may change, by path; nothing is allocated."""
    module = empty_module(source.family.parts[part].build, source.configs[part], part)
    return {
        path: tuple(layer.weight.shape)
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
