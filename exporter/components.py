"""The components of a pipeline as functions of tensors, ready to be exported.

Names of inputs and outputs are those of Optimum's exports, so that other tools recognise them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    pass


@contextmanager
def embeddings_added(model: nn.Module, input_ids: Tensor, extra_embeddings: Tensor) -> Iterator[Tensor]:
    """Let a CLIP text encoder read vectors that its table of tokens does not have.

    Args:
        model: The text encoder.
        input_ids: Token ids ``[batch, length]``; those below zero are added vectors: -1 the first, -2 the second.
        extra_embeddings: The vectors ``[count, width]``, one at least.

    Yields:
        Ids to give the model meanwhile. In place of an added vector's there is 0, which is not the end of a text: the
        pooled state is that of the first end-of-text token, which some models find as the largest id.
    """
    added = input_ids < 0
    rows = (-1 - input_ids).clamp(min=0)

    def replace(module: nn.Module, inputs: object, found: Tensor) -> Tensor:
        return torch.where(added[..., None], extra_embeddings[rows], found)

    encoder: Any = getattr(model, "text_model", model)
    hook = encoder.embeddings.token_embedding.register_forward_hook(replace)
    try:
        yield torch.where(added, 0, input_ids)
    finally:
        hook.remove()


class TextEncoder(nn.Module):
    """CLIP text encoder: token ids ``[batch, length]`` to the last and the penultimate hidden state and the pooled one.

    The penultimate state is that of ``clip_skip=1`` in diffusers ("clip skip 2" elsewhere): one layer fewer, then
    the final layer normalisation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: Tensor, extra_embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode; states are ``[batch, length, width]``, the pooled state ``[batch, width]``.

        The inputs are those of :func:`embeddings_added`.
        """
        with embeddings_added(self.model, input_ids, extra_embeddings) as ids:
            output = self.model(ids, output_hidden_states=True)
        norm = getattr(self.model, "text_model", self.model).final_layer_norm
        return output.last_hidden_state, norm(output.hidden_states[-2]), output.pooler_output


class Denoiser(nn.Module):
    """U-Net: latents ``[batch, channels, h, w]``, timesteps ``[batch]``, text states to a prediction like latents."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet: Any = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        """Predict noise, velocity or sample, as the model was trained; one that was distilled is told the guidance."""
        prediction: Tensor = self.unet(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]
        return prediction


class InpaintingDenoiser(nn.Module):
    """U-Net that was made for inpainting: its latents, the mask and what is outside of it are joined by channel.

    Takes ``inpaint``, ``[batch, 1 + channels, h, w]``, after the latents, and then what any :class:`Denoiser` takes.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.denoiser = Denoiser(unet)

    def forward(self, sample: Tensor, inpaint: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Predict as the denoiser does."""
        prediction: Tensor = self.denoiser(torch.cat([sample, inpaint], dim=1), timestep, encoder_hidden_states)
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
        latents: Inputs like the latents that stay the same throughout a request, with one row a sample.
        beside: Further inputs that go with the latents.
        residuals: Of a ControlNet its outputs, with channels and the names of height and width; it has no prediction.
    """

    sample: str
    prediction: str
    conditioning: tuple[str, ...]
    time: tuple[str, ...]
    vectors: tuple[str, ...] = ()
    latents: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    residuals: Mapping[str, tuple[int, str, str]] = field(default_factory=dict)


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
        roles: For the denoiser, or a ControlNet, which is then also exported in stages.
    """

    name: str
    module: nn.Module
    example: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    keep_fp32: frozenset[str] = frozenset()
    roles: Roles | None = None
