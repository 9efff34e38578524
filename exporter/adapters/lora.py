"""LoRA files, fused into the weights of a model before it is exported: nothing of them is left at run time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.bundle.manifest import Adapter
from latentrt.runtime.lora import reading as lora
from latentrt.runtime.lora.reading import LoraFile as LoraFile

from ..source.optimum import GraphFolders
from ..source.source import Source
from ..source.weights import empty_module


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits a source.

    Attributes:
        content: What it changes.
    """

    content: lora.Lora

    @property
    def adapter(self) -> Adapter:
        """For the manifest."""
        return Adapter(self.content.name, self.content.applied.sha256, self.content.applied.scale)

    def fuse(self, part: str, module: nn.Module) -> None:
        """Add to the weights of a part.

        Raises:
            SourceError: if a weight is not finite afterwards.
        """
        for path in self.content.factors.get(part, {}):
            layer: Any = module.get_submodule(path)
            fused = layer.weight.detach().clone(memory_format=torch.contiguous_format)
            self.content.add_to(part, path, fused.numpy())
            layer.weight = nn.Parameter(fused, requires_grad=False)


def with_loras(source: Source, files: Sequence[LoraFile]) -> Source:
    """A source whose parts come with LoRAs fused in; every file is read and checked here.

    Raises:
        SourceError: if a file is missing, damaged, no LoRA, or one for another model.
        InvalidRequestError: if the source holds graphs that others exported.
    """
    if not files:
        return source
    if isinstance(source.weights, GraphFolders):
        raise InvalidRequestError(f"{source.name} holds graphs that are run as they are; a LoRA is fused into weights")
    target = lora.Target(source.name, source.family.denoiser, source.configs.keys(), functools.partial(_shapes, source))
    loras = tuple(Lora(lora.read_lora(target, file)) for file in files)
    digest = hashlib.sha256(source.fingerprint.encode())
    for each in loras:
        digest.update(f"\0{each.adapter.sha256}\0{each.adapter.scale!r}".encode())
    return dataclasses.replace(source, loras=loras, fingerprint=digest.hexdigest())


def _shapes(source: Source, part: str) -> lora.Shapes:
    """Shapes of the weights that a LoRA may change, by path; nothing is allocated."""
    module = empty_module(source.family.parts[part].build, source.configs[part], part)
    return {
        path: tuple(layer.weight.shape)
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
