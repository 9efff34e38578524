"""Stable Diffusion 3 and 3.5: two CLIP text encoders, a T5 that may be missing, and a transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from latentrt.engines.errors import SourceError
from latentrt.engines.trt import Range
from latentrt.runtime.request.options import MAX_SIDE

from ..components import Checkpoint, Component, Roles
from .base import Config, Family, Part, TokenizerPart, latent_factor
from .checks import check_blocks, check_clip, check_size, check_vae, natural
from .flow import FlowFamily
from .parts import CLIP_TOKENIZERS, VAE, autoencoder, denoiser_axes, embedding_ranges, known, text_encoder
from .sdxl import CLIP_TEXT_PROJECTED, STATES, HiddenStates
from .t5 import T5_TEXT, check_t5, t5_encoder, t5_tokenizer, text_ranges

TRANSFORMER = Part(
    ("SD3Transformer2DModel",),
    "diffusion_pytorch_model",
    lambda config: SD3Transformer2DModel(**known(config, SD3Transformer2DModel)),
)
_CLIP, _T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
_SEQUENCE = 256  # tokens of T5 by default, as in diffusers
_EXAMPLE_TEXT = 19  # states after those of CLIP
_PATCHES = (6, 10)  # of an example, down and across; half as many again must be a whole number
_LEAST_POSITIONS = 16  # more than an example of another size has


class Sd3Denoiser(nn.Module):
    """MMDiT: latents ``[batch, channels, h, w]``, timesteps ``[batch]``, text states and a pooled one to a flow."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer: Any = transformer

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """Predict the flow."""
        prediction: Tensor = self.transformer(
            sample, encoder_hidden_states, pooled_projections, timestep, return_dict=False
        )[0]
        return prediction


class StableDiffusion3(FlowFamily):
    """Esser et al. 2024, arXiv 2403.03206."""

    name = "stable-diffusion-3"
    pipelines = ("StableDiffusion3Pipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": CLIP_TEXT_PROJECTED,
        "text_encoder_2": CLIP_TEXT_PROJECTED,
        "text_encoder_3": T5_TEXT,
        "transformer": TRANSFORMER,
        "vae": VAE,
    }
    tokenizers: ClassVar[Mapping[str, TokenizerPart]] = {
        "tokenizer": TokenizerPart(CLIP_TOKENIZERS, "text_encoder"),
        "tokenizer_2": TokenizerPart(CLIP_TOKENIZERS, "text_encoder_2"),
        "tokenizer_3": t5_tokenizer("text_encoder_3"),
    }
    components: ClassVar[tuple[str, ...]] = (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "transformer",
        "vae_decoder",
        "vae_encoder",
    )
    vectors = ("pooled_projections",)
    guidance = 7.0

    def variant(self, index: Config) -> Family:
        """The family without T5 where the source has none; its states are then zeros, as in diffusers."""
        return _WithoutT5() if index.get(_T5) in (None, [None, None]) else self

    def check(self, configs: Mapping[str, Config]) -> None:
        """Check that widths of text states, of the pooled states, and channels of latents agree."""
        transformer, vae = configs["transformer"], configs["vae"]
        check_blocks("vae", vae)
        width = natural("transformer", transformer, "joint_attention_dim", 4096)
        clip = sum(check_clip(name, configs[name]) for name in _CLIP)
        if clip > width:
            raise SourceError(f"CLIP's states are {clip} wide together, but the transformer takes {width}")
        for name in _CLIP:
            if natural(name, configs[name], "num_hidden_layers", 12) < 2:
                raise SourceError(f"{name}/config.json: 'num_hidden_layers' is 1, expected 2 or more")
        lengths = {natural(name, configs[name], "max_position_embeddings", 77) for name in _CLIP}
        if len(lengths) > 1:
            raise SourceError(
                f"the text encoders take {' and '.join(map(str, sorted(lengths)))} tokens, expected one length for both"
            )
        pooled = sum(natural(name, configs[name], "projection_dim", 512) for name in _CLIP)
        taken = natural("transformer", transformer, "pooled_projection_dim", 2048)
        if pooled != taken:
            raise SourceError(f"CLIP's pooled states are {pooled} wide together, but the transformer takes {taken}")
        if _T5 in configs:
            check_t5(_T5, configs[_T5], width)
        channels = natural("transformer", transformer, "in_channels", 16)
        given = transformer.get("out_channels", 16)
        if given not in (None, channels):
            raise SourceError(f"the transformer takes {channels} channels and gives {given!r}, expected as many")
        check_vae(vae, channels, "transformer")
        check_size("transformer", transformer, latent_factor(vae))
        positions = natural("transformer", transformer, "pos_embed_max_size", 96)
        if positions < _LEAST_POSITIONS:
            raise SourceError(
                f"transformer/config.json: 'pos_embed_max_size' is {positions}, expected {_LEAST_POSITIONS} or more"
            )

    def component(self, checkpoint: Checkpoint, name: str, generator: torch.Generator) -> Component:
        """A text encoder, the transformer, or a half of the VAE."""
        if name in _CLIP:
            return text_encoder(checkpoint, name, HiddenStates, (*STATES, "text_embeds"), generator)
        if name == _T5:
            return t5_encoder(checkpoint, name, generator)
        if name != "transformer":
            return autoencoder(checkpoint, name, generator)
        config, patch = checkpoint.configs["transformer"], _patch(checkpoint)
        down, across = (count * patch for count in _PATCHES)
        channels, width = int(config.get("in_channels", 16)), int(config.get("joint_attention_dim", 4096))
        pooled = int(config.get("pooled_projection_dim", 2048))
        example = {
            "sample": torch.randn(2, channels, down, across, generator=generator),
            "timestep": torch.rand(2, generator=generator) * 999,
            "encoder_hidden_states": torch.randn(
                2, _clip_length(checkpoint) + _EXAMPLE_TEXT, width, generator=generator
            ),
            "pooled_projections": torch.randn(2, pooled, generator=generator),
        }
        conditioning = ("encoder_hidden_states", *self.vectors)
        return Component(
            name,
            Sd3Denoiser(checkpoint.load(name)),
            example,
            denoiser_axes(example),
            ("out_sample",),
            frozenset({"timestep"}),
            Roles("sample", "out_sample", conditioning, ("timestep",), self.vectors),
        )

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """Pixels along one side of a patch."""
        return _patch(checkpoint) * super().size_multiple(checkpoint)

    def size(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Width and height in pixels by ``sample_size``, which is 128 latents where the configuration has none."""
        side = int(checkpoint.configs["transformer"].get("sample_size") or 128) * latent_factor(
            checkpoint.configs["vae"]
        )
        return side, side

    def lengths(self, checkpoint: Checkpoint) -> Mapping[str, Range]:
        """Numbers of T5's tokens, of CLIP's and T5's states together, and of added vectors."""
        return {**text_ranges(_SEQUENCE, _clip_length(checkpoint)), **embedding_ranges(checkpoint, "text_encoder")}

    def settings(self, checkpoint: Checkpoint) -> dict[str, bool | int | float | str]:
        """Whether there is a T5, the latents of a patch, and the largest side in pixels."""
        positions = int(checkpoint.configs["transformer"].get("pos_embed_max_size", 96))
        return {
            **super().settings(checkpoint),
            "t5": _T5 in self.parts,
            "patch": _patch(checkpoint),
            "largest_side": min(positions * self.size_multiple(checkpoint), MAX_SIDE),
        }


class _WithoutT5(StableDiffusion3):
    parts: ClassVar[Mapping[str, Part]] = {n: part for n, part in StableDiffusion3.parts.items() if n != _T5}
    tokenizers: ClassVar[Mapping[str, TokenizerPart]] = {
        name: part for name, part in StableDiffusion3.tokenizers.items() if part.encoder != _T5
    }
    components: ClassVar[tuple[str, ...]] = tuple(name for name in StableDiffusion3.components if name != _T5)


def _patch(checkpoint: Checkpoint) -> int:
    return natural("transformer", checkpoint.configs["transformer"], "patch_size", 2)


def _clip_length(checkpoint: Checkpoint) -> int:
    return int(checkpoint.configs["text_encoder"].get("max_position_embeddings", 77))
