"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, and a U-Net that attends to its states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from latentrt.engines.errors import SourceError
from latentrt.engines.trt import Range

from ..components import Checkpoint, Component, Denoiser, InpaintingDenoiser, Roles, TextEncoder
from .base import Config, Family, Part, TokenizerPart, latent_factor
from .checks import check_blocks, check_clip, check_guidance, check_size, check_unet_channels, inpaints, natural
from .parts import (
    CLIP_TEXT,
    CLIP_TOKENIZERS,
    LCM_DEFAULTS,
    UNET,
    VAE,
    autoencoder,
    clip_ranges,
    denoiser_axes,
    guidance_input,
    guidance_kind,
    text_encoder,
    unet_inputs,
)


class StableDiffusion(Family):
    """Rombach et al. 2022, arXiv 2112.10752; latent consistency models (Luo et al. 2023, arXiv 2310.04378) too."""

    name = "stable-diffusion"
    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline", "StableDiffusionInpaintPipeline")
    parts: ClassVar[Mapping[str, Part]] = {"text_encoder": CLIP_TEXT, "unet": UNET, "vae": VAE}
    tokenizers: ClassVar[Mapping[str, TokenizerPart]] = {"tokenizer": TokenizerPart(CLIP_TOKENIZERS, "text_encoder")}
    components = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    denoiser = "unet"
    controllable = True
    optimum: ClassVar[Mapping[str, tuple[str, ...]]] = {"text_encoder": ("last_hidden_state",)}

    def check(self, configs: Mapping[str, Config]) -> None:
        """Check that widths of text states and channels of latents agree."""
        text, unet, vae = (configs[part] for part in self.parts)
        for where, config in (("unet", unet), ("vae", vae)):
            check_blocks(where, config)
        width, expected = check_clip("text_encoder", text), natural("unet", unet, "cross_attention_dim", 1280)
        if width != expected:
            raise SourceError(f"the text encoder's states are {width} wide, but the U-Net takes {expected}")
        check_unet_channels(unet, vae)
        check_size("unet", unet, latent_factor(vae))
        check_guidance(unet)

    def component(self, checkpoint: Checkpoint, name: str, generator: torch.Generator) -> Component:
        """The text encoder, the U-Net, or a half of the VAE."""
        if name == "text_encoder":
            outputs = ("last_hidden_state", "penultimate_hidden_state", "pooler_output")
            return text_encoder(checkpoint, name, TextEncoder, outputs, generator)
        if name != "unet":
            return autoencoder(checkpoint, name, generator)
        example = self.denoiser_inputs(checkpoint, generator)
        guidance = guidance_input(checkpoint, generator)
        vectors = tuple(guidance)
        example |= guidance
        masks = ("inpaint",) if inpaints(checkpoint.configs["unet"], checkpoint.configs["vae"]) else ()
        roles = Roles("sample", "out_sample", ("encoder_hidden_states", *vectors), ("timestep",), vectors, masks)
        unet = checkpoint.load(name)
        return Component(
            name,
            InpaintingDenoiser(unet) if masks else Denoiser(unet),
            example,
            denoiser_axes(example),
            ("out_sample",),
            frozenset({"timestep"}),
            roles,
        )

    def denoiser_inputs(self, checkpoint: Checkpoint, generator: torch.Generator) -> dict[str, Tensor]:
        """Latents, timesteps and text states."""
        length = int(checkpoint.configs["text_encoder"].get("max_position_embeddings", 77))
        return unet_inputs(checkpoint, length, generator)

    def lengths(self, checkpoint: Checkpoint) -> Mapping[str, Range]:
        """Lengths of prompts in chunks, and numbers of added vectors."""
        return clip_ranges(checkpoint, "text_encoder")

    def settings(self, checkpoint: Checkpoint) -> dict[str, bool | int | float | str]:
        """The kind of guidance."""
        return {"guidance": guidance_kind(checkpoint)}

    def defaults(self, checkpoint: Checkpoint) -> tuple[int, float]:
        """Steps and guidance scale; those of latent consistency models where the U-Net takes the scale."""
        return LCM_DEFAULTS if guidance_kind(checkpoint) == "embedded" else super().defaults(checkpoint)
