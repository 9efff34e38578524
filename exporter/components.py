"""The components of a pipeline as functions of tensors, and the interfaces that make them of a model.

Names of inputs and outputs are those of Optimum's exports, so that other tools recognise them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from latentrt.engines.errors import SourceError
from latentrt.engines.trt import Range
from latentrt.runtime.bundle import manifest as m


@contextmanager
def embeddings_added(model: nn.Module, input_ids: Tensor, extra_embeddings: Tensor) -> Iterator[Tensor]:
    """Let a CLIP text encoder read vectors that its table of tokens does not have, inside a with statement.

    Args:
        model: The text encoder.
        input_ids: Token ids ``[batch, length]``; those below zero are added vectors: -1 the first, -2 the second.
        extra_embeddings: The vectors ``[count, width]``, one at least.

    Yields:
        Ids to give to the model inside the with statement. An added vector has the id 0, which is not the end of a
        prompt: the pooled state is that of the first end-of-text token, which some models find as the largest id.
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
    """U-Net: latents ``[batch, channels, h, w]``, timesteps ``[batch]`` and text states to a prediction."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet: Any = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        """Predict noise, velocity or sample, as the model was trained; ``timestep_cond`` embeds the guidance scale."""
        prediction: Tensor = self.unet(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]
        return prediction


class InpaintingDenoiser(nn.Module):
    """U-Net that was made for inpainting: latents, mask and latents of the masked image are joined by channel.

    It takes ``inpaint``, ``[batch, 1 + channels, h, w]``, after the latents, and then the other inputs of
    :class:`Denoiser`.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.denoiser = Denoiser(unet)

    def forward(self, sample: Tensor, inpaint: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Predict as :class:`Denoiser` does."""
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
    """The part that each input of a denoiser plays, so that its loop can be compiled.

    Attributes:
        sample: The latents.
        prediction: The output.
        conditioning: Inputs that depend on prompts and options, and stay the same throughout a request.
        time: Inputs that change with the step alone.
        vectors: Those inputs among ``conditioning`` that have one vector a row.
        latents: Inputs like the latents that stay the same throughout a request, with one row a sample.
        beside: Further inputs with one row a sample that go with the latents.
        residuals: Outputs of a ControlNet, with channels and the names of height and width. A ControlNet has no
            prediction.
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
    """A module to export, with all that decides its graph.

    Attributes:
        name: Its name, which is that of its folder in the bundle.
        module: fp32, on the CPU, in evaluation mode.
        example: Inputs by name at a small size; floating-point ones are fp32.
        dynamic: For each input the names of its dimensions of variable length, by axis.
        outputs: Names of the outputs.
        keep_fp32: Inputs that stay fp32 at any precision.
        roles: Roles of the inputs of a denoiser or ControlNet; a component with roles is exported in stages too.
    """

    name: str
    module: nn.Module
    example: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    keep_fp32: frozenset[str] = frozenset()
    roles: Roles | None = None


class Checkpoint(Protocol):
    """A checked model as families read it: configurations, and parts with their weights."""

    @property
    def name(self) -> str:
        """The name that messages use."""
        ...

    @property
    def index(self) -> Mapping[str, Any]:
        """``model_index.json``."""
        ...

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """``config.json`` of each part with weights, by the name of the part."""
        ...

    def load(self, part: str) -> nn.Module:
        """Build a part with its weights on the CPU, in evaluation mode.

        Raises:
            SourceError: if configuration and weights do not fit each other, or a weight is not finite.
        """
        ...


class AdaptedCheckpoint(Checkpoint, Protocol):
    """A checkpoint with its adapters, whose components an adapter may ask for."""

    def load_component(self, name: str, *, seed: int = 0) -> Component:
        """Build a component, which every adapter has extended; its example inputs are drawn from the seed.

        Raises:
            SourceError: if there is no such component, or it cannot be built.
        """
        ...


class Adapter(ABC):
    """Weights of another file that go into a model or beside it, checked against the model that they are for.

    An adapter may do any of four things, and does none of them unless its class says so: change weights of the model
    (:attr:`fuses`), change components of the model (:meth:`extend`), add components of its own (:attr:`components`),
    or add graphs that are made of the denoiser's (:attr:`twins`).
    """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Text that stands for the content of all its files and settings.

        A model's fingerprint with the adapter is the SHA-256 of the fingerprint without it, followed by this text. It
        begins with a NUL character, and differs from what an adapter of another kind could have.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions that reading the files took, a sentence each."""
        return ()

    @property
    def records(self) -> tuple[m.Adapter, ...]:
        """Files that a manifest names as fused into the weights."""
        return ()

    @property
    def fuses(self) -> tuple[str, ...]:
        """Parts of the model whose weights :meth:`fuse` changes; they are loaded in fp32 whatever is exported."""
        return ()

    def fuse(self, part: str, module: nn.Module) -> None:
        """Change the weights of a part in place.

        Args:
            part: One of :attr:`fuses`.
            module: The part, fp32.

        Raises:
            SourceError: if a weight is not finite afterwards.
        """
        raise SourceError(f"the adapter changes no weights of {part!r}")

    def extend(self, component: Component, generator: torch.Generator) -> Component:
        """A component of the model's own, extended; the same component if the adapter adds nothing to it.

        Args:
            component: The component of the family, which earlier adapters have extended.
            generator: Example values of new inputs are drawn from it.

        Raises:
            SourceError: if it cannot be built.
        """
        return component

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that it adds, in the order in which they are exported."""
        return ()

    def stages(self, name: str) -> tuple[str, ...]:
        """The stages that one of :attr:`components` is split into, see :mod:`latentrt.exporter.graphs.stages`."""
        return ()

    @property
    def twins(self) -> tuple[str, ...]:
        """Names of further denoisers whose graphs :meth:`derive` makes of the denoiser's.

        The last stage of a twin is called as the twin with ``_step`` behind it; its other stages are the denoiser's.
        """
        return ()

    def derive(self, whole: m.Graph, step: m.Graph, directory: Path) -> Mapping[str, m.Graph]:
        """Make the twins' graphs, which share the denoiser's file of weights.

        Args:
            whole: The denoiser's exported graph.
            step: Its last stage.
            directory: The bundle under construction, which holds both.

        Returns:
            For each of :attr:`twins` the whole graph and its last stage, by name.

        Raises:
            ExportError: if the denoiser's graph has no place for the twin's further inputs.
        """
        return {}

    def component(self, model: AdaptedCheckpoint, name: str, generator: torch.Generator) -> Component:
        """Build one of :attr:`components`, or one of :attr:`twins` to compare its graphs with.

        Args:
            model: The model, with all its adapters.
            name: Which one.
            generator: Example inputs are drawn from it.

        Raises:
            SourceError: if it cannot be built.
        """
        raise SourceError(f"the adapter has no component {name!r}")

    def ranges(self, plain: Mapping[str, Mapping[str, Range]]) -> Mapping[str, Mapping[str, Range]]:
        """Ranges of every symbol of its components' graphs, for compiled engines.

        Args:
            plain: Those of the model's own components, and of the stages of its denoiser.

        Returns:
            By component, or by stage for what is split. A range that every component shares, such as one of the
            lengths of prompts, may be left out.
        """
        return {}
