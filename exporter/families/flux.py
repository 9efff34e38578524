"""FLUX.1: CLIP's pooled text state, T5's states, and a transformer over packed latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from latentrt.engines.checks import is_integer
from latentrt.engines.errors import SourceError
from latentrt.engines.trt import Range
from latentrt.runtime.request.options import LONGEST_SEQUENCE, MAX_SIDE

from ..components import Checkpoint, Component, Roles, TextEncoder
from .base import Config, Part, TokenizerPart, latent_factor
from .checks import check_blocks, check_clip, check_vae, natural
from .flow import FlowFamily
from .parts import CLIP_TEXT, CLIP_TOKENIZERS, VAE, autoencoder, denoiser_axes, embedding_ranges, known, text_encoder
from .t5 import T5_TEXT, check_t5, t5_encoder, t5_tokenizer, text_ranges

TRANSFORMER = Part(
    ("FluxTransformer2DModel",),
    "diffusion_pytorch_model",
    lambda config: FluxTransformer2DModel(**known(config, FluxTransformer2DModel)),
)
PATCH = 2
"""Latents along one side of the square that is packed into one token."""

_AXES = (16, 56, 56)  # the default of diffusers' class
_THETA = 10_000.0
_SIDE = 128  # latents that the pipeline draws by default
_EXAMPLE_TEXT = 21
_EXAMPLE_SIDES = (12, 20)  # half as much again must be even too
_MOST_SCALE = 1000.0  # the transformer embeds time and guidance in thousandths


class Rotation(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) of a text and of an image's tokens, in three parts.

    Text is at the origin, the token in row y and column x of an image at (0, y, x). Cosines and sines are tabulated in
    double precision, so that the graph holds no trigonometry and engines need no type for it.

    Args:
        widths: Numbers of a head that each part turns, all even.
        positions: Rows or columns of tokens that an image may have.
    """

    def __init__(self, widths: tuple[int, int, int], positions: int) -> None:
        super().__init__()
        self.widths = widths
        # No buffers: cast to half precision, the tables would lose the precision that they are for.
        self.tables = {width: _tables(width, positions) for width in set(widths[1:])}

    def forward(self, text: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 ``[text + rows * columns, sum of widths]``."""
        _, down, across = self.widths
        turned = []
        for number, still in enumerate((1.0, 0.0)):
            by_row = self.tables[down][number][:rows, None].expand(rows, columns, down)
            by_column = self.tables[across][number][None, :columns].expand(rows, columns, across)
            first = torch.full((rows, columns, self.widths[0]), still)
            image = torch.cat([first, by_row, by_column], dim=-1).reshape(rows * columns, sum(self.widths))
            turned.append(torch.cat([torch.full((text, sum(self.widths)), still), image]))
        return turned[0], turned[1]


def _tables(width: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``[positions, width]``; neighbours turn together."""
    with torch.device("cpu"):
        rates = _THETA ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), rates).repeat_interleave(2, dim=1)
        return angles.cos().float(), angles.sin().float()


class FluxDenoiser(nn.Module):
    """FLUX's transformer over latents as they are: packing into tokens, positions and unpacking are inside.

    Its own ``forward`` would round timesteps to half precision where the weights have it, and compute positions in
    double precision.
    """

    def __init__(self, transformer: Any, rotation: Rotation) -> None:
        super().__init__()
        self.transformer, self.rotation = transformer, rotation

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Predict the flow.

        Args:
            sample: Latents ``[batch, channels, h, w]``, both sides even.
            timestep: From 0 to 1000, ``[batch]``.
            encoder_hidden_states: T5's states ``[batch, length, width]``.
            pooled_projections: CLIP's pooled state ``[batch, width]``.
            guidance_scale: ``[batch]``, for a transformer that takes it.
        """
        model = self.transformer
        batch, channels, height, width = sample.shape
        rows, columns = height // PATCH, width // PATCH
        tokens = sample.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        image = model.x_embedder(tokens.reshape(batch, rows * columns, channels * PATCH**2))
        scales = () if guidance_scale is None else (guidance_scale * _MOST_SCALE,)
        embedding = model.time_text_embed(timestep, *scales, pooled_projections)
        text = model.context_embedder(encoder_hidden_states)
        positions = self.rotation(text.shape[1], rows, columns)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, temb=embedding, image_rotary_emb=positions
            )
        projected: torch.Tensor = model.proj_out(model.norm_out(image, embedding))
        tokens = projected.reshape(batch, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return tokens.reshape(batch, channels, height, width)


class Flux(FlowFamily):
    """Black Forest Labs 2024, https://github.com/black-forest-labs/flux."""

    name = "flux"
    pipelines = ("FluxPipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": T5_TEXT,
        "transformer": TRANSFORMER,
        "vae": VAE,
    }
    tokenizers: ClassVar[Mapping[str, TokenizerPart]] = {
        "tokenizer": TokenizerPart(CLIP_TOKENIZERS, "text_encoder"),
        "tokenizer_2": t5_tokenizer("text_encoder_2"),
    }
    components = ("text_encoder", "text_encoder_2", "transformer", "vae_decoder", "vae_encoder")
    vectors = ("pooled_projections",)
    guidance = 3.5

    def check(self, configs: Mapping[str, Config]) -> None:
        """Check that widths of text states and channels of latents agree, and that positions fill a head."""
        transformer, vae = configs["transformer"], configs["vae"]
        check_blocks("vae", vae)
        pooled = check_clip("text_encoder", configs["text_encoder"])
        taken = natural("transformer", transformer, "pooled_projection_dim", 768)
        if pooled != taken:
            raise SourceError(f"CLIP's pooled state is {pooled} wide, but the transformer takes {taken}")
        width = natural("transformer", transformer, "joint_attention_dim", 4096)
        check_t5("text_encoder_2", configs["text_encoder_2"], width)
        packed = natural("transformer", transformer, "in_channels", 64)
        given = transformer.get("out_channels")
        if packed % PATCH**2 or given not in (None, packed) or transformer.get("patch_size", 1) != 1:
            raise SourceError(
                f"the transformer takes {packed} channels a token and gives {given!r} in patches of "
                f"{transformer.get('patch_size', 1)!r}; expected four for each channel of a latent, as many, and 1; "
                "transformers for filling or editing, which take more, are not supported"
            )
        check_vae(vae, packed // PATCH**2, "transformer")
        head, axes = natural("transformer", transformer, "attention_head_dim", 128), _axes(transformer)
        if sum(axes) != head or any(width % 2 for width in axes):
            raise SourceError(
                f"transformer/config.json: 'axes_dims_rope' is {list(axes)}, expected even numbers that sum up to "
                f"the width of a head, {head}"
            )
        if not isinstance(transformer.get("guidance_embeds", False), bool):
            raise SourceError(
                f"transformer/config.json: 'guidance_embeds' is {transformer['guidance_embeds']!r}, "
                "expected true or false"
            )

    def component(self, checkpoint: Checkpoint, name: str, generator: torch.Generator) -> Component:
        """A text encoder, the transformer, or a half of the VAE."""
        if name == "text_encoder":
            outputs = ("last_hidden_state", "penultimate_hidden_state", "pooler_output")
            return text_encoder(checkpoint, name, TextEncoder, outputs, generator)
        if name == "text_encoder_2":
            return t5_encoder(checkpoint, name, generator)
        if name != "transformer":
            return autoencoder(checkpoint, name, generator)
        config = checkpoint.configs["transformer"]
        channels, width = int(config.get("in_channels", 64)) // PATCH**2, int(config.get("joint_attention_dim", 4096))
        example = {
            "sample": torch.randn(2, channels, *_EXAMPLE_SIDES, generator=generator),
            "timestep": torch.rand(2, generator=generator) * 999,
            "encoder_hidden_states": torch.randn(2, _EXAMPLE_TEXT, width, generator=generator),
            "pooled_projections": torch.randn(2, int(config.get("pooled_projection_dim", 768)), generator=generator),
        }
        vectors: tuple[str, ...] = self.vectors
        if config.get("guidance_embeds", False):
            example["guidance_scale"] = torch.rand(2, generator=generator) * 7
            vectors = (*vectors, "guidance_scale")
        rotation = Rotation(_axes(config), MAX_SIDE // self.size_multiple(checkpoint))
        return Component(
            name,
            FluxDenoiser(checkpoint.load(name), rotation),
            example,
            denoiser_axes(example),
            ("out_sample",),
            frozenset({"timestep", "guidance_scale"}),
            Roles("sample", "out_sample", ("encoder_hidden_states", *vectors), ("timestep",), vectors),
        )

    def defaults(self, checkpoint: Checkpoint) -> tuple[int, float]:
        """Steps and guidance scale: 28 steps of a model that takes the scale, 4 of one that does not."""
        embedded = checkpoint.configs["transformer"].get("guidance_embeds", False)
        return (self.steps, self.guidance) if embedded else (4, 1.0)

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """Pixels along one side of a token."""
        return PATCH * super().size_multiple(checkpoint)

    def size(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Width and height in pixels of the pipeline's default; the configuration names none."""
        side = _SIDE * latent_factor(checkpoint.configs["vae"])
        return side, side

    def lengths(self, checkpoint: Checkpoint) -> Mapping[str, Range]:
        """Numbers of T5's tokens, which are all that the transformer attends to, and of added vectors."""
        return {**text_ranges(LONGEST_SEQUENCE), **embedding_ranges(checkpoint, "text_encoder")}

    def settings(self, checkpoint: Checkpoint) -> dict[str, bool | int | float | str]:
        """Whether the transformer takes the guidance scale, and the latents of a patch."""
        embedded = checkpoint.configs["transformer"].get("guidance_embeds", False)
        return {**super().settings(checkpoint), "guidance": "embedded" if embedded else "none", "patch": PATCH}


def _axes(config: Config) -> tuple[int, int, int]:
    axes = config.get("axes_dims_rope", _AXES)
    if not isinstance(axes, list | tuple) or len(axes) != 3 or not all(is_integer(n) and n >= 2 for n in axes):
        raise SourceError(f"transformer/config.json: 'axes_dims_rope' is {axes!r}, expected three whole numbers")
    return axes[0], axes[1], axes[2]
