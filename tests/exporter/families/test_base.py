"""What every family says of its models: sizes, latents, stages, defaults and components."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from latentrt.engines.errors import SourceError
from latentrt.exporter.families import FAMILIES, PIPELINES, Family
from latentrt.exporter.families.base import latent_factor
from latentrt.exporter.source.opening import open_source
from latentrt.runtime.families import FAMILIES as RUN
from latentrt.runtime.samplers import SAMPLERS, default_sampler

KINDS = ("sd1", "sdxl", "sdxl-refiner", "sd35", "flux-dev")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_family_is_sound(family: Family) -> None:
    """The runtime knows each, tokenizers belong to encoders that are parts, and only the denoiser has stages."""
    assert family.name in RUN
    assert {tokenizer.encoder for tokenizer in family.tokenizers.values()} <= set(family.parts)
    assert family.denoiser in family.components
    stages = [name for name in family.components if len(family.with_stages(name)) > 1]
    assert stages == [family.denoiser]
    assert family.with_stages(family.denoiser) == (family.denoiser, *family.stages())
    assert all(PIPELINES[pipeline] is family for pipeline in family.pipelines)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_diffusers(tiny: Any, kind: str) -> None:
    """Sides, latents and their scaling are what diffusers' pipeline of the same directory works with."""
    source = open_source(tiny.source(kind))
    family, pipeline = source.family, DiffusionPipeline.from_pretrained(tiny.source(kind))
    vae = pipeline.vae
    latent = family.latent(source)
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    assert (latent.channels, 32 // latent.vae_scale_factor) == (latents.shape[1], latents.shape[-1])
    assert latent_factor(source.configs["vae"]) == latent.vae_scale_factor
    assert (latent.scaling, latent.shift) == (vae.config.scaling_factor, vae.config.shift_factor or 0.0)
    width, height = family.size(source)
    assert width % family.size_multiple(source) == height % family.size_multiple(source) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_make_a_plan(tiny: Any, kind: str) -> None:
    """The default sampler of the scheduler runs with the default number of steps."""
    source = open_source(tiny.source(kind))
    steps, guidance = source.family.defaults(source)
    sampler = default_sampler(source.scheduler)
    assert sampler in SAMPLERS
    assert steps >= 1
    assert guidance >= 0
    source.family.compile_plan(source.scheduler, sampler, steps)


def test_families_that_nothing_steers(tiny: Any) -> None:
    """Inputs that a ControlNet shares are refused where the family has none."""
    source = open_source(tiny.source("sd35"))
    assert not source.family.controllable
    with pytest.raises(SourceError, match="ControlNets do not go with models of stable-diffusion-3"):
        source.family.denoiser_inputs(source, torch.Generator())
