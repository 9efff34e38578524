"""Base of the families of models: the parts that a source is made of, and how each becomes a component."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latentrt.engines.errors import SourceError
from latentrt.engines.trt import Range
from latentrt.runtime.bundle.manifest import STAGES, Latent
from latentrt.runtime.samplers import Plan, compile_plan

from ..components import Checkpoint, Component

Config = Mapping[str, Any]
"""A ``config.json``, bounded but otherwise not trusted."""


@dataclass(frozen=True)
class Part:
    """A part of a source with weights.

    Attributes:
        classes: Names that ``model_index.json`` may have for its class. They are compared alone: no class is looked up
            by such a name.
        stem: Name of its files of weights, without ending.
        build: Makes the module from its configuration.
        rename: Gives tensors of the files the names that the module has for them.
    """

    classes: tuple[str, ...]
    stem: str
    build: Callable[[Config], nn.Module]
    rename: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = lambda tensors, module: tensors


@dataclass(frozen=True)
class TokenizerPart:
    """A tokenizer of a source.

    Attributes:
        classes: Names that ``model_index.json`` may have for its class.
        encoder: The text encoder that takes its ids.
        kind: A key of :data:`latentrt.runtime.text.tokenizers.TOKENIZERS`.
        length: Ids of an encoded prompt; ``None`` stands for as many as the encoder has positions for.
    """

    classes: tuple[str, ...]
    encoder: str
    kind: str = "clip"
    length: int | None = None


class Family(ABC):
    """A family. It has no state: one object serves all sources."""

    name: ClassVar[str]
    """Its name in a manifest."""
    pipelines: ClassVar[tuple[str, ...]]
    """The classes of diffusers' pipelines that belong to it."""
    parts: ClassVar[Mapping[str, Part]]
    """Parts with weights, by the name of their folder in a source."""
    tokenizers: ClassVar[Mapping[str, TokenizerPart]]
    """Tokenizers, by the name of their folder in a source."""
    components: ClassVar[tuple[str, ...]]
    """Components that are exported, in the order in which a bundle has them."""
    denoiser: ClassVar[str]
    """The component that runs in a loop."""
    vectors: ClassVar[tuple[str, ...]] = ()
    """Inputs of the denoiser that have one vector a row and stay the same throughout a request."""
    optimum: ClassVar[Mapping[str, tuple[str, ...]] | None] = None
    """Outputs that graphs of text encoders must have, by encoder, for a directory that Optimum exported to be taken
    over; ``None`` if such directories are not supported."""
    steps: ClassVar[int] = 20
    """Sampler steps by default."""
    guidance: ClassVar[float] = 7.5
    """Guidance scale by default."""
    controllable: ClassVar[bool] = False
    """Whether ControlNets and IP-Adapters go with its models; then it has :meth:`denoiser_inputs`."""
    prediction: ClassVar[str] = "epsilon"
    """The denoiser's prediction where the scheduler's configuration does not name it."""

    def variant(self, index: Config) -> Family:
        """The family of a source: this one, or one of fewer parts where the source may lack some.

        Args:
            index: ``model_index.json``.
        """
        return self

    def defaults(self, checkpoint: Checkpoint) -> tuple[int, float]:
        """Steps and guidance scale by default."""
        return self.steps, self.guidance

    def compile_plan(self, scheduler: Config, sampler: str, steps: int) -> Plan:
        """Compile a sampler as a request would, to see that there is a plan.

        Args:
            scheduler: ``scheduler_config.json``.
            sampler: Name of the sampler.
            steps: Its steps.

        Raises:
            InvalidRequestError: if there is none.
        """
        return compile_plan(sampler, scheduler, steps)

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """Pixels that width and height of an image are multiples of."""
        return latent_factor(checkpoint.configs["vae"])

    def lengths(self, checkpoint: Checkpoint) -> Mapping[str, Range]:
        """Ranges of the lengths of prompts that vary, by symbol of the graphs."""
        return {}

    def stages(self) -> tuple[str, ...]:
        """Components that the denoiser is split into, see :mod:`latentrt.exporter.graphs.stages`."""
        return tuple(f"{self.denoiser}_{stage}" for stage in STAGES)

    def with_stages(self, name: str) -> tuple[str, ...]:
        """A component, and its stages if it is the denoiser."""
        return (name, *self.stages()) if name == self.denoiser else (name,)

    @abstractmethod
    def check(self, configs: Mapping[str, Config]) -> None:
        """Check the numbers that the exporter itself computes with, and those in which the parts must agree.

        Args:
            configs: Configurations of every part.

        Raises:
            SourceError: naming the first number that does not fit.
        """

    @abstractmethod
    def component(self, checkpoint: Checkpoint, name: str, generator: torch.Generator) -> Component:
        """Build one of :attr:`components`, with example inputs drawn from ``generator``.

        Sizes differ from each other and from what the model was trained on, so that no length is mistaken for another.

        Raises:
            SourceError: if it cannot be built.
        """

    def denoiser_inputs(self, checkpoint: Checkpoint, generator: torch.Generator) -> dict[str, Tensor]:
        """Example inputs that the denoiser has in common with a ControlNet.

        Raises:
            SourceError: if the family has none, see :attr:`controllable`.
        """
        raise SourceError(f"ControlNets do not go with models of {self.name}")

    def settings(self, checkpoint: Checkpoint) -> dict[str, bool | int | float | str]:
        """Settings of this very model for the runtime, see :attr:`latentrt.runtime.families.Family.settings`.

        Raises:
            SourceError: if the model lacks an entry, or has a value that is not supported.
        """
        return {"guidance": "classifier-free"}

    def size(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Width and height in pixels that the model was trained on."""
        side = checkpoint.configs[self.denoiser].get("sample_size") or 64
        height, width = (side, side) if isinstance(side, int) else side
        factor = latent_factor(checkpoint.configs["vae"])
        return width * factor, height * factor

    def latent(self, checkpoint: Checkpoint) -> Latent:
        """The latent space."""
        vae = checkpoint.configs["vae"]
        return Latent(
            channels=int(vae.get("latent_channels", 4)),
            vae_scale_factor=latent_factor(vae),
            scaling=float(vae.get("scaling_factor", 0.18215)),
            shift=float(vae.get("shift_factor") or 0.0),
        )


def latent_factor(vae: Config) -> int:
    """Pixels along one side for one latent element: 8 in Stable Diffusion."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))
