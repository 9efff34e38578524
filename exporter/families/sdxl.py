"""Stable Diffusion XL, base model: two CLIP text encoders, and a U-Net that takes sizes and crop too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from latentrt.engines.errors import SourceError
from latentrt.engines.trt import Range

from ..components import Checkpoint, Component, Roles, embeddings_added
from .base import Config, Family, Part, TokenizerPart, latent_factor
from .checks import check_blocks, check_clip, check_guidance, check_size, check_unet_channels, inpaints, natural
from .parts import (
    CLIP_TEXT,
    CLIP_TOKENIZERS,
    LCM_DEFAULTS,
    UNET,
    VAE,
    autoencoder,
    clip_names,
    clip_ranges,
    denoiser_axes,
    guidance_input,
    guidance_kind,
    known,
    text_encoder,
    unet_inputs,
)

CLIP_TEXT_PROJECTED = Part(
    ("CLIPTextModelWithProjection",),
    "model",
    lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**known(config, CLIPTextConfig))),
    clip_names,
)
STATES = ("penultimate_hidden_state", "antepenultimate_hidden_state")
"""Outputs of both text encoders; the second has ``text_embeds`` too."""

_TIME_IDS = 6  # height and width of the original, top and left of the crop, height and width of the target
_EXAMPLE_SIDE = 1024  # pixels


class HiddenStates(nn.Module):
    """CLIP text encoder: token ids ``[batch, length]`` to the states that enter its last layer, and its last but one.

    They are not normalised, as the U-Net was trained (Podell et al. 2023, arXiv 2307.01952, section 2.1): index -2 of
    diffusers' ``hidden_states``, and -3 for ``clip_skip=1``. A model with a projection gives its pooled and projected
    state too, ``[batch, width]``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.projected = hasattr(model, "text_projection")

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor) -> tuple[Tensor, ...]:
        """Encode; states are ``[batch, length, width]``. The inputs are those of :func:`embeddings_added`."""
        with embeddings_added(self.model, input_ids, extra_embeddings) as ids:
            output = self.model(ids, output_hidden_states=True)
        states = (output.hidden_states[-2], output.hidden_states[-3])
        return (*states, output.text_embeds) if self.projected else states


class SizedDenoiser(nn.Module):
    """U-Net of SDXL: it takes a pooled text state ``[batch, width]``, and sizes and crop ``[batch, ids]`` too."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet: Any = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Predict noise, velocity or sample, as the model was trained; ``timestep_cond`` embeds the guidance scale."""
        # The sinusoids of the sizes are fp32 at any precision. The U-Net joins the pooled text to them, and then casts:
        # in half precision that would be a Concat of two types, which ONNX does not have.
        added = {"text_embeds": text_embeds.float(), "time_ids": time_ids}
        prediction: Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction


class SizedInpaintingDenoiser(nn.Module):
    """U-Net of SDXL for inpainting: it takes the mask and latents of the masked image after the latents."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.denoiser = SizedDenoiser(unet)

    def forward(
        self,
        sample: Tensor,
        inpaint: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        """Predict as the denoiser does."""
        joined = torch.cat([sample, inpaint], dim=1)
        prediction: Tensor = self.denoiser(joined, timestep, encoder_hidden_states, text_embeds, time_ids)
        return prediction


class StableDiffusionXl(Family):
    """Podell et al. 2023, arXiv 2307.01952; SDXL-Turbo is a model of this family too."""

    name = "stable-diffusion-xl"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline")
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": CLIP_TEXT_PROJECTED,
        "unet": UNET,
        "vae": VAE,
    }
    tokenizers: ClassVar[Mapping[str, TokenizerPart]] = {
        "tokenizer": TokenizerPart(CLIP_TOKENIZERS, "text_encoder"),
        "tokenizer_2": TokenizerPart(CLIP_TOKENIZERS, "text_encoder_2"),
    }
    components: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
    denoiser = "unet"
    # Two layers at least: then there are states before the last layer, and before the last but one.
    optimum: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_encoder": ("hidden_states.2",),
        "text_encoder_2": ("hidden_states.2", "text_embeds"),
    }
    vectors = ("text_embeds", "time_ids")
    controllable = True
    guidance = 5.0
    time_ids: ClassVar[int] = _TIME_IDS
    """Numbers of size and crop that the U-Net takes."""

    def check(self, configs: Mapping[str, Config]) -> None:
        """Check that widths of text states, of the pooled state with the sizes, and channels of latents agree."""
        unet, vae = configs["unet"], configs["vae"]
        for where, config in (("unet", unet), ("vae", vae)):
            check_blocks(where, config)
        encoders = [name for name in configs if name.startswith("text_encoder")]
        width = sum(check_clip(name, configs[name]) for name in encoders)
        for name in encoders:
            if natural(name, configs[name], "num_hidden_layers", 12) < 2:
                raise SourceError(f"{name}/config.json: 'num_hidden_layers' is 1, expected 2 or more")
        lengths = {natural(name, configs[name], "max_position_embeddings", 77) for name in encoders}
        if len(lengths) > 1:
            raise SourceError(
                f"the text encoders take {' and '.join(map(str, sorted(lengths)))} tokens, expected one length for both"
            )
        expected = natural("unet", unet, "cross_attention_dim", 1280)
        if width != expected:
            raise SourceError(f"the text encoders' states are {width} wide together, but the U-Net takes {expected}")
        if unet.get("addition_embed_type") != "text_time":
            raise SourceError(
                f"unet/config.json: 'addition_embed_type' is {unet.get('addition_embed_type')!r}, expected 'text_time'"
            )
        pooled = natural("text_encoder_2", configs["text_encoder_2"], "projection_dim", 512)
        added = pooled + self.time_ids * natural("unet", unet, "addition_time_embed_dim", 256)
        if added != (taken := natural("unet", unet, "projection_class_embeddings_input_dim", 0)):
            raise SourceError(f"pooled text and {self.time_ids} sizes are {added} wide, but the U-Net takes {taken}")
        check_unet_channels(unet, vae)
        check_size("unet", unet, latent_factor(vae))
        check_guidance(unet)

    def component(self, checkpoint: Checkpoint, name: str, generator: torch.Generator) -> Component:
        """A text encoder, the U-Net, or a half of the VAE."""
        if name.startswith("text_encoder"):
            outputs = (*STATES, "text_embeds") if name == "text_encoder_2" else STATES
            return text_encoder(checkpoint, name, HiddenStates, outputs, generator)
        if name != "unet":
            return autoencoder(checkpoint, name, generator)
        example = self.denoiser_inputs(checkpoint, generator)
        example |= guidance_input(checkpoint, generator)
        vectors = tuple(name for name in (*self.vectors, "timestep_cond") if name in example)
        masks = ("inpaint",) if inpaints(checkpoint.configs["unet"], checkpoint.configs["vae"]) else ()
        roles = Roles("sample", "out_sample", ("encoder_hidden_states", *vectors), ("timestep",), vectors, masks)
        unet = checkpoint.load(name)
        module = SizedInpaintingDenoiser(unet) if masks else SizedDenoiser(unet)
        keep = frozenset({"timestep", "time_ids"})
        return Component(name, module, example, denoiser_axes(example), ("out_sample",), keep, roles)

    def denoiser_inputs(self, checkpoint: Checkpoint, generator: torch.Generator) -> dict[str, Tensor]:
        """Latents, timesteps, text states, the pooled state, and the numbers of size and crop."""
        text = checkpoint.configs["text_encoder_2"]
        example = unet_inputs(checkpoint, int(text.get("max_position_embeddings", 77)), generator)
        example["text_embeds"] = torch.randn(2, int(text.get("projection_dim", 512)), generator=generator)
        example["time_ids"] = torch.rand(2, self.time_ids, generator=generator) * _EXAMPLE_SIDE
        return example

    def lengths(self, checkpoint: Checkpoint) -> Mapping[str, Range]:
        """Lengths of prompts in chunks, and numbers of added vectors."""
        return clip_ranges(checkpoint, "text_encoder_2")

    def defaults(self, checkpoint: Checkpoint) -> tuple[int, float]:
        """Steps and guidance scale; those of latent consistency models where the U-Net takes the scale."""
        return LCM_DEFAULTS if guidance_kind(checkpoint) == "embedded" else super().defaults(checkpoint)

    def settings(self, checkpoint: Checkpoint) -> dict[str, bool | int | float | str]:
        """The kind of guidance, and whether the states of an empty negative prompt are all zeros."""
        zeros = checkpoint.index.get("force_zeros_for_empty_prompt", True)
        if not isinstance(zeros, bool):
            raise SourceError(f"model_index.json: 'force_zeros_for_empty_prompt' is {zeros!r}, expected true or false")
        return {"guidance": guidance_kind(checkpoint), "force_zeros_for_empty_prompt": zeros}
