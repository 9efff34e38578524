"""The families of models that can be exported: one small module each, on top of :mod:`.base`."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Family as Family
from .flux import Flux
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXl
from .sdxl_refiner import StableDiffusionXlRefiner
from .stable_diffusion import StableDiffusion

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (StableDiffusion(), StableDiffusionXl(), StableDiffusionXlRefiner(), StableDiffusion3(), Flux())
}
"""Families by the name that a manifest has."""

PIPELINES: Mapping[str, Family] = {pipeline: family for family in FAMILIES.values() for pipeline in family.pipelines}
"""Families by the class of diffusers' pipeline."""
