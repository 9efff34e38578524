"""A model to export: a checked source together with its adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentrt.engines.errors import SourceError
from latentrt.runtime.bundle import manifest as m

from .components import Adapter, Component
from .families import Family
from .source.source import Source


@dataclass(frozen=True)
class Model:
    """A source with adapters: a checkpoint with the adapters' changes in its weights and components.

    Attributes:
        source: The checked model.
        adapters: Adapters of the source, in the order in which they change it.
        dtype: Element type that weights are loaded in.
    """

    source: Source
    adapters: tuple[Adapter, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """The name that messages use."""
        return self.source.name

    @property
    def index(self) -> Mapping[str, Any]:
        """``model_index.json``."""
        return self.source.index

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """``config.json`` of each part with weights, by the name of the part."""
        return self.source.configs

    @property
    def family(self) -> Family:
        """The family that the model belongs to."""
        return self.source.family

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions that reading the files took, a sentence each."""
        return (*self.source.notes, *(note for adapter in self.adapters for note in adapter.notes))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides the export: the source, and each adapter in its turn."""
        fingerprint = self.source.fingerprint
        for adapter in self.adapters:
            fingerprint = hashlib.sha256(f"{fingerprint}{adapter.fingerprint}".encode()).hexdigest()
        return fingerprint

    @property
    def records(self) -> tuple[m.Adapter, ...]:
        """Files that a manifest names as fused into the weights."""
        return tuple(record for adapter in self.adapters for record in adapter.records)

    @property
    def components(self) -> tuple[str, ...]:
        """Components that torch exports: those of the family, then those of each adapter."""
        return (*self.family.components, *(name for adapter in self.adapters for name in adapter.components))

    @property
    def twins(self) -> tuple[str, ...]:
        """Denoisers whose graphs are made of the denoiser's, see :attr:`latentrt.exporter.components.Adapter.twins`."""
        return tuple(twin for adapter in self.adapters for twin in adapter.twins)

    @property
    def all_components(self) -> tuple[str, ...]:
        """Every component of a bundle: stages and twins too."""
        return tuple(part for name in self.components for part in self.with_stages(name))

    def with_stages(self, name: str) -> tuple[str, ...]:
        """A component with its stages; the denoiser comes with its twins and their last stages too."""
        for adapter in self.adapters:
            if name in adapter.components:
                return (name, *adapter.stages(name))
        twins = self.twins if name == self.family.denoiser else ()
        return (*self.family.with_stages(name), *(part for twin in twins for part in (twin, f"{twin}_{m.STAGES[-1]}")))

    def load(self, part: str) -> nn.Module:
        """Build a part with weights, such as ``unet`` or ``vae``, on the CPU, in evaluation mode; adapters are fused.

        It is fp32 in spite of :attr:`dtype` if a weight leaves the range of that type, or an adapter changes it.

        Raises:
            SourceError: if configuration and weights do not fit each other, or a weight is not finite.
        """
        fusing = [adapter for adapter in self.adapters if part in adapter.fuses]
        module = self.source.load(part, torch.float32 if fusing else self.dtype)
        for adapter in fusing:
            adapter.fuse(part, module)
        return module

    def load_component(self, name: str, *, seed: int = 0) -> Component:
        """Build one of :attr:`components` or :attr:`twins`, with example inputs drawn from a seeded generator.

        Raises:
            SourceError: if it cannot be built, or none has that name.
        """
        generator = torch.Generator().manual_seed(seed)
        for adapter in self.adapters:
            if name in (*adapter.components, *adapter.twins):
                return adapter.component(self, name, generator)
        if name not in self.family.components:
            raise SourceError(f"{self.name} has no component {name!r}; it has {', '.join(self.components)}")
        component = self.family.component(self, name, generator)
        for adapter in self.adapters:
            component = adapter.extend(component, generator)
        return component
