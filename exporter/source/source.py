"""A checked model: a diffusers directory, a single-file checkpoint, or a model on a hub.

A source is read without trusting it, and nothing in it decides what code runs: class names are compared with those of a
table, configuration files contribute numbers and names of known layers alone, and weights come from safetensors. A
source is read completely, and checked against its own configuration, before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from latentrt.engines.errors import SourceError

from ..families import Family
from .description import TokenizerFolder
from .tokenizers import KINDS, read_tokenizer
from .weights import assign, empty_module


class Weights(Protocol):
    """Reads the weights of a model, part by part."""

    def read(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of a part with the names that its class has for them.

        Args:
            name: The part.
            dtype: As for :func:`latentrt.exporter.source.weights.read_tensors`.

        Raises:
            SourceError: if they are missing, damaged or not finite.
        """
        ...


@dataclass(frozen=True)
class Source:
    """A checked model.

    Attributes:
        name: The name of its directory, of its file without the ending, or the one that it has on a hub.
        family: The family that it belongs to.
        index: ``model_index.json``.
        configs: ``config.json`` of each part with weights, by name.
        scheduler: ``scheduler_config.json``, without a bound that diffusers writes as ``-Infinity``.
        licence: The licence that the model card names, or ``"unknown"``.
        fingerprint: SHA-256 over all that decides the export.
        weights: Reads its weights.
        tokenizers: Folders of its tokenizers, by name.
        notes: Assumptions that reading it took, a sentence each.
    """

    name: str
    family: Family
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    licence: str
    fingerprint: str
    weights: Weights
    tokenizers: Mapping[str, TokenizerFolder]
    notes: tuple[str, ...] = ()

    def load(self, part: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build a part with weights, such as ``unet`` or ``vae``, on the CPU, in evaluation mode.

        Args:
            part: Its name, a key of :attr:`configs`.
            dtype: Element type of its weights; all are fp32 where one leaves the range of that type.

        Raises:
            SourceError: if configuration and weights do not fit each other, or a weight is not finite.
        """
        described, config = self.family.parts[part], self.configs[part]
        tensors = self.weights.read(part, dtype)
        if any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors.values()):
            tensors = self.weights.read(part, torch.float32)
        module = empty_module(described.build, config, part)
        tensors = described.rename(tensors, module)
        assign(module, tensors, part)
        if any(buffer.is_meta for buffer in module.buffers()):  # tables that are not stored, such as position ids
            module = described.build(config)
            assign(module, tensors, part)
        return module.eval().requires_grad_(False)

    def load_tokenizer(self, name: str = "tokenizer") -> PreTrainedTokenizerBase:
        """Build a tokenizer from its vocabulary files.

        Args:
            name: A key of :attr:`tokenizers`.

        Raises:
            SourceError: if a file is missing or damaged, or the text encoder does not know all of its tokens.
        """
        folder, label = self.tokenizers[name], f"the {name} of {self.name}"
        part = self.family.tokenizers[name]
        tokenizer = read_tokenizer(folder.path, part.kind, label, folder.padding)
        highest = max(tokenizer.get_vocab().values())
        rows = int(self.configs[part.encoder].get("vocab_size", KINDS[part.kind].rows))
        if highest >= rows:
            raise SourceError(f"{label} has token ids up to {highest}, its text encoder only {rows} tokens")
        if tokenizer.pad_token_id is None:
            raise SourceError(f"{label} has no padding token")
        return tokenizer
