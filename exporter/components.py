"""The components of a Stable Diffusion pipeline as functions of tensors, ready to be exported.

Names of inputs and outputs are those of Optimum's exports, so that other tools recognise them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentrt.engines.errors import SourceError

from .source import Source


class TextEncoder(nn.Module):
    """CLIP text encoder: token ids ``[batch, length]`` to the last and the penultimate hidden state and the pooled one.

    The penultimate state is that of ``clip_skip=1`` in diffusers ("clip skip 2" elsewhere): one layer fewer, then
    the final layer normalisation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode; states are ``[batch, length, width]``, the pooled state ``[batch, width]``."""
        output = self.model(input_ids, output_hidden_states=True)
        norm = getattr(self.model, "text_model", self.model).final_layer_norm
        return output.last_hidden_state, norm(output.hidden_states[-2]), output.pooler_output


class Denoiser(nn.Module):
    """U-Net: latents ``[batch, channels, h, w]``, timesteps ``[batch]``, text states to a prediction like latents."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet: Any = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Predict noise, velocity or sample, as the model was trained."""
        prediction: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return prediction


class Decoder(nn.Module):
    """VAE decoder: latents ``[batch, channels, h, w]``, already divided by the scaling factor, to pixels in [-1, 1]."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Decode to ``[batch, 3, h * factor, w * factor]``."""
        pixels: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return pixels


class Encoder(nn.Module):
    """VAE encoder: pixels ``[batch, 3, H, W]`` in [-1, 1] to mean and log variance ``[batch, 2 * channels, h, w]``."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, sample: Tensor) -> Tensor:
        """Encode to the parameters of the posterior, before scaling."""
        parameters: Tensor = self.vae.encode(sample).latent_dist.parameters
        return parameters


@dataclass(frozen=True)
class Roles:
    """What the inputs of a denoiser are, so that its loop can be compiled.

    Attributes:
        sample: The latents.
        prediction: The output.
        conditioning: Inputs that stay the same throughout a request.
        time: Inputs that change with the step alone.
        vectors: The inputs among ``conditioning`` with one vector a row.
    """

    sample: str
    prediction: str
    conditioning: tuple[str, ...]
    time: tuple[str, ...]
    vectors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Component:
    """A module to export with all that the exporter must know.

    Attributes:
        name: Folder in the bundle.
        module: fp32, on the CPU, in evaluation mode.
        example: Inputs by name at a small size; floating-point ones are fp32.
        dynamic: For each input the names of its dimensions of variable length.
        outputs: Names of the outputs.
        keep_fp32: Inputs that stay fp32 at any precision.
        roles: For the denoiser, which is then also exported in stages.
    """

    name: str
    module: nn.Module
    example: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    keep_fp32: frozenset[str] = frozenset()
    roles: Roles | None = None


NAMES = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
STAGES = {"unet": ("unet_prompt", "unet_schedule", "unet_step")}
"""Components that a denoiser is split into, see :mod:`latentrt.exporter.stages`."""
ALL = tuple(part for name in NAMES for part in (name, *STAGES.get(name, ())))
"""Every component of a bundle, in its order."""
_PICTURE = {0: "batch", 2: "height", 3: "width"}
_LATENT = {0: "batch", 2: "latent_height", 3: "latent_width"}


def latent_factor(source: Source) -> int:
    """How many pixels a latent is wide: 8 in Stable Diffusion."""
    return int(2 ** (len(source.configs["vae"]["block_out_channels"]) - 1))


def load_component(source: Source, name: str, *, seed: int = 0) -> Component:
    """Build one component of ``source`` with example inputs drawn from a seeded generator.

    Sizes differ from each other and from what the model was trained on, so that no length is mistaken for another.

    Raises:
        SourceError: if the component cannot be built, or none has that name.
    """
    if name not in NAMES:
        raise SourceError(f"{source.name} has no component {name!r}; it has {', '.join(NAMES)}")
    generator = torch.Generator().manual_seed(seed)
    text, unet, vae = (source.configs[part] for part in ("text_encoder", "unet", "vae"))
    length, channels = int(text.get("max_position_embeddings", 77)), int(unet.get("in_channels", 4))
    # Not divisible by what the U-Net halves: then it passes the size of each skip connection to the upsampling that
    # meets it, and the graph serves every size rather than multiples of that factor alone.
    side = 2 * 2 ** (len(unet["block_out_channels"]) - 1) + 1
    if name == "text_encoder":
        ids = torch.randint(int(text.get("vocab_size", 49408)), (2, length), generator=generator)
        outputs = ("last_hidden_state", "penultimate_hidden_state", "pooler_output")
        return Component(name, TextEncoder(source.load(name)), {"input_ids": ids}, {"input_ids": {0: "batch"}}, outputs)
    if name == "unet":
        width = unet.get("cross_attention_dim", 1280)
        example = {
            "sample": torch.randn(2, channels, side, side + 2, generator=generator),
            "timestep": torch.rand(2, generator=generator) * 999,
            "encoder_hidden_states": torch.randn(2, length, int(width), generator=generator),
        }
        dynamic = {"sample": _LATENT, "timestep": {0: "batch"}, "encoder_hidden_states": {0: "batch"}}
        roles = Roles("sample", "out_sample", ("encoder_hidden_states",), ("timestep",))
        return Component(
            name, Denoiser(source.load(name)), example, dynamic, ("out_sample",), frozenset({"timestep"}), roles
        )
    model, factor = source.load("vae"), latent_factor(source)
    if name == "vae_decoder":
        latents = torch.randn(2, int(vae.get("latent_channels", 4)), 8, 12, generator=generator)
        return Component(name, Decoder(model), {"latent_sample": latents}, {"latent_sample": _LATENT}, ("sample",))
    pixels = torch.rand(2, 3, 8 * factor, 12 * factor, generator=generator) * 2 - 1
    return Component(name, Encoder(model), {"sample": pixels}, {"sample": _PICTURE}, ("latent_parameters",))
