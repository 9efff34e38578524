"""A model to export: a checked source with its adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from latentrt.engines.errors import SourceError
from latentrt.runtime.bundle.manifest import IMAGE_ENCODER, SAFETY_CHECKER, TINY_DECODER

from .components import Component

if TYPE_CHECKING:
    from .source.source import Source


def load_component(source: Source, name: str, *, seed: int = 0) -> Component:
    """Build one component of ``source`` with example inputs drawn from a seeded generator.

    Raises:
        SourceError: if the component cannot be built, or none has that name.
    """
    if name not in source.components:
        raise SourceError(f"{source.name} has no component {name!r}; it has {', '.join(source.components)}")
    generator = torch.Generator().manual_seed(seed)
    if source.tiny_vae is not None and name == TINY_DECODER:
        return source.tiny_vae.component(generator)
    if source.safety_checker is not None and name == SAFETY_CHECKER:
        return source.safety_checker.component(generator)
    for net in source.controlnets:
        if name in net.components:
            return net.component(source, name, generator)
    adapter = source.ip_adapter
    if adapter is not None and name == IMAGE_ENCODER:
        return adapter.encoder(generator)
    component = source.family.component(source, name, generator)
    pictured = adapter is not None and name == source.family.denoiser
    return adapter.extended(component, generator) if adapter is not None and pictured else component
