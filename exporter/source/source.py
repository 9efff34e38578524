"""Reading a model without trusting it: a diffusers directory, a single-file checkpoint, or what a hub has of either.

Nothing in a source decides what code runs: class names are looked up in a table here, configuration files
contribute numbers and names of known layers alone, and weights come from safetensors. A source is read completely
and checked against its own configuration before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from latentrt.engines.errors import SourceError
from latentrt.runtime.bundle.manifest import IMAGE_ENCODER, SAFETY_CHECKER, STAGES, TINY_DECODER, controlled

from ..families import Family
from .description import TokenizerFolder
from .tokenizers import KINDS, read_tokenizer
from .weights import assign, empty_module

if TYPE_CHECKING:
    from ..adapters.controlnet import ControlNet
    from ..adapters.ip_adapter import IpAdapter
    from ..adapters.lora import Lora
    from ..adapters.safety_checker import SafetyChecker
    from ..adapters.tiny_vae import TinyVae


class Weights(Protocol):
    """Where weights come from."""

    def read(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of a part with the names that its class has for them, see
        :func:`latentrt.exporter.source.weights.read_tensors`.

        Raises:
            SourceError: if they are missing, damaged or not finite.
        """


@dataclass(frozen=True)
class Source:
    """A checked model.

    Attributes:
        name: What it is called: its directory, its file without the ending, or its name on a hub.
        family: The family that it belongs to.
        index: ``model_index.json``.
        configs: ``config.json`` of each part with weights, by name.
        scheduler: ``scheduler_config.json``, without a bound that diffusers writes as ``-Infinity``.
        licence: What the model card says of the licence, or ``"unknown"``.
        fingerprint: SHA-256 over all that decides the export.
        weights: Where its weights come from.
        tokenizers: Where its tokenizers are.
        notes: What was assumed, a sentence each.
        loras: Fused into the weights of the parts, see :mod:`latentrt.exporter.adapters.lora`.
        tiny_vae: A decoder beside the model's own.
        controlnets: Beside its denoiser.
        ip_adapter: In its denoiser.
        safety_checker: Looks at pictures.
        dtype: What weights are loaded as.
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
    loras: tuple[Lora, ...] = ()
    tiny_vae: TinyVae | None = None
    controlnets: tuple[ControlNet, ...] = ()
    ip_adapter: IpAdapter | None = None
    safety_checker: SafetyChecker | None = None
    dtype: torch.dtype = torch.float32

    @property
    def components(self) -> tuple[str, ...]:
        """Components that are exported, in the order in which a bundle has them."""
        beside = [name for net in self.controlnets for name in net.components]
        tiny = [] if self.tiny_vae is None else [TINY_DECODER]
        image_encoder = [] if self.ip_adapter is None else [IMAGE_ENCODER]
        checker = [] if self.safety_checker is None else [SAFETY_CHECKER]
        return (*self.family.components, *tiny, *image_encoder, *beside, *checker)

    @property
    def all_components(self) -> tuple[str, ...]:
        """Every component of a bundle, the denoiser's stages too."""
        return tuple(part for name in self.components for part in self.with_stages(name))

    def with_stages(self, name: str) -> tuple[str, ...]:
        """A component, and its stages if it is the denoiser or a ControlNet; with those, the denoiser has a twin."""
        if any(name == net.body for net in self.controlnets):
            return (name, *(f"{name}_{stage}" for stage in STAGES))
        twin = controlled(name)
        has_twin = self.controlnets and name == self.family.denoiser
        return (*self.family.with_stages(name), *((twin, f"{twin}_{STAGES[-1]}") if has_twin else ()))

    def load(self, name: str) -> nn.Module:
        """Build a part with weights, such as ``unet`` or ``vae``, on the CPU, in evaluation mode.

        It is fp32 in spite of :attr:`dtype` if a weight leaves the range of that, or LoRAs are to be added.

        Raises:
            SourceError: if configuration and weights do not fit each other, or a weight is not finite.
        """
        part, config = self.family.parts[name], self.configs[name]
        dtype = torch.float32 if self.loras else self.dtype
        tensors = self.weights.read(name, dtype)
        if any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors.values()):
            tensors = self.weights.read(name, torch.float32)
        module = empty_module(part.build, config, name)
        tensors = part.rename(tensors, module)
        assign(module, tensors, name)
        if any(buffer.is_meta for buffer in module.buffers()):  # tables that are not stored, such as position ids
            module = part.build(config)
            assign(module, tensors, name)
        for lora in self.loras:
            lora.fuse(name, module)
        return module.eval().requires_grad_(False)

    def load_tokenizer(self, name: str = "tokenizer") -> PreTrainedTokenizerBase:
        """Build a tokenizer from its vocabulary files.

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
