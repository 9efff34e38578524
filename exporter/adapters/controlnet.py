"""ControlNets beside a U-Net: they steer it by an image of edges, depth or poses.

Zhang et al. 2023 (arXiv 2302.05543): a copy of the U-Net's first half sees the latents and a control image. Each level
of it computes residuals, which are added to the U-Net's skip connections and to the output of its middle. Here each
ControlNet is split as the denoiser is, with one stage more for all that depends on the control image alone; and the
U-Net gets a twin that takes the sums of residuals and uses the same file of weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.engines.trt import Range
from latentrt.runtime.bundle.manifest import CONTROL_NAME, CONTROLNET, STAGES, Graph, controlled

from ..components import AdaptedCheckpoint, Adapter, Component, Roles
from ..families import Family
from ..families.base import latent_factor
from ..families.checks import check_blocks, natural, naturals
from ..families.parts import LATENT_AXES, denoiser_axes, known
from ..source.description import check_bounds
from ..source.source import Source
from ..source.weights import assign, empty_module, read_json, read_weights, weight_files
from .base import AdapterFiles, Option, content_digest, require_directory
from .controlled import controlled_component, export_controlled, with_levels
from .residuals import Shape, residual_shapes

_CLASS = "ControlNetModel"
_STEM = "diffusion_pytorch_model"
_MOST_LEVELS, _MOST_WIDTH = 7, 10**4
_MOST_CONTROLNETS = 16
# Entries that a ControlNet and its U-Net must agree in, with diffusers' values where a configuration has none.
_AGREED: Mapping[str, object] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1280,
    "addition_embed_type": None,
    "projection_class_embeddings_input_dim": None,
    "addition_time_embed_dim": None,
}


@dataclass(frozen=True)
class ControlNetFile:
    """A ControlNet to build in.

    Attributes:
        name: The name that requests use: lower-case letters, digits and dashes.
        path: A diffusers directory of the ControlNet alone.
    """

    name: str
    path: Path

    def __post_init__(self) -> None:
        if not re.fullmatch(CONTROL_NAME, self.name, re.ASCII):
            raise InvalidRequestError(
                f"a ControlNet is called {self.name!r}, expected up to 40 lower-case letters, digits and dashes; "
                "give one as NAME=DIR"
            )

    @classmethod
    def parse(cls, text: str) -> ControlNetFile:
        """Read ``NAME=DIR``, or ``DIR``, whose name is then that of the directory.

        Raises:
            InvalidRequestError: if the name is none that requests can have.
        """
        name, equals, path = text.partition("=")
        if equals and not Path(text).exists():
            return cls(name, Path(path))
        directory = Path(text)
        return cls(directory.resolve().name.lower().replace("_", "-").replace(".", "-"), directory)


@dataclass(frozen=True)
class ControlNetFiles(AdapterFiles):
    """ControlNets to build in.

    Attributes:
        files: Their directories and names.
    """

    title: ClassVar[str] = "a ControlNet"
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "--controlnet",
            "[NAME=]DIR",
            "ControlNetModel that requests may steer images with; may be repeated",
            repeated=True,
        ),
    )
    controls: ClassVar[bool] = True
    files: tuple[ControlNetFile, ...]

    @classmethod
    def parse(cls, values: Mapping[str, Sequence[str]]) -> Self | None:
        """One directory for each value."""
        files = tuple(map(ControlNetFile.parse, values.get("controlnet", ())))
        return cls(files) if files else None

    def open(self, source: Source) -> ControlNets:
        """Check every directory, and that its ControlNet is one for the source."""
        names = [file.name for file in self.files]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InvalidRequestError(f"two ControlNets are called {twice[0]!r}; give each a name as NAME=DIR")
        if len(names) > _MOST_CONTROLNETS:
            raise InvalidRequestError(f"{len(names)} ControlNets are given, at most {_MOST_CONTROLNETS} fit one bundle")
        nets = tuple(ControlNet.open(file, source) for file in self.files)
        return ControlNets(nets, source.family, residual_shapes(source.configs[source.family.denoiser]))


class ControlImage(nn.Module):
    """All that depends on the control image alone: ``[batch, 3, H, W]`` from 0 to 1 to the width of the first level.

    Args:
        embedding: The layers.
        reverse: Whether they were trained on blue, green, red.
    """

    def __init__(self, embedding: nn.Module, reverse: bool) -> None:
        super().__init__()
        self.embedding: Any = embedding
        self.reverse = reverse

    def forward(self, control_image: Tensor) -> Tensor:
        """Embed to ``[batch, channels, h, w]``, the size of latents."""
        embedded: Tensor = self.embedding(control_image.flip(1) if self.reverse else control_image)
        return embedded


class ControlNetBody(nn.Module):
    """Inputs of a U-Net and an embedded control image to residuals: one for each skip connection and for the middle."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        control: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the residuals, not yet scaled."""
        added = None
        if text_embeds is not None:
            added = {"text_embeds": text_embeds.float(), "time_ids": time_ids}
        down, middle = self.net(
            sample, timestep, encoder_hidden_states, control, added_cond_kwargs=added, return_dict=False
        )
        return (*down, middle)


@dataclass(frozen=True)
class ControlNet:
    """A checked ControlNet of a source.

    Attributes:
        name: The name that requests use.
        path: Its directory.
        config: Its ``config.json``.
        digest: SHA-256 over name, configuration and weights.
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(repr=False)
    digest: str

    @property
    def body(self) -> str:
        """The component that is split into stages."""
        return f"{CONTROLNET}{self.name}"

    @property
    def image(self) -> str:
        """The component that embeds the control image."""
        return f"{self.body}_image"

    @classmethod
    def open(cls, file: ControlNetFile, source: Source) -> ControlNet:
        """Check a directory.

        Raises:
            SourceError: if it is no ControlNet, is damaged, or is one for another model.
        """
        path = file.path
        require_directory(path, "ControlNet")
        config = read_json(path / "config.json", "a directory of a ControlNetModel is expected")
        if config.get("_class_name") != _CLASS:
            raise SourceError(f"{path.name} is a {config.get('_class_name')!r}, expected {_CLASS}")
        check_bounds(config, f"{path.name}/config.json")
        check_blocks(path.name, config)
        _check_unet(path.name, config, source)
        _check_image(path.name, config, source)
        digest = content_digest((path / "config.json", *weight_files(path, _STEM)), file.name)
        net = cls(file.name, path, config, digest)
        net._empty()  # refuses a configuration that describes no model
        return net

    def _empty(self) -> nn.Module:
        # ControlImage takes care of the order of colours; diffusers would reverse the channels of its output.
        config = {**self.config, "controlnet_conditioning_channel_order": "rgb"}
        return empty_module(_build, config, self.path.name)

    def load(self) -> nn.Module:
        """Build it in fp32, on the CPU, in evaluation mode.

        Raises:
            SourceError: if configuration and weights do not fit each other, or a weight is not finite.
        """
        model, tensors = self._empty(), read_weights(self.path, _STEM)
        assign(model, tensors, self.path.name)
        return model.eval().requires_grad_(False)

    def image_component(self, checkpoint: AdaptedCheckpoint, generator: torch.Generator) -> Component:
        """:attr:`image`, with an example drawn from ``generator``.

        Raises:
            SourceError: if it cannot be built.
        """
        net: Any = self.load()
        factor = latent_factor(checkpoint.configs["vae"])
        reverse = self.config.get("controlnet_conditioning_channel_order", "rgb") == "bgr"
        module = ControlImage(net.controlnet_cond_embedding, reverse).eval()
        pixels = torch.rand(2, 3, 8 * factor, 12 * factor, generator=generator)
        axes = {0: "batch", 2: "height", 3: "width"}
        return Component(self.image, module, {"control_image": pixels}, {"control_image": axes}, ("control",))

    def body_component(self, checkpoint: AdaptedCheckpoint, family: Family, generator: torch.Generator) -> Component:
        """:attr:`body`, with example inputs drawn from ``generator``.

        Raises:
            SourceError: if it cannot be built.
        """
        net: Any = self.load()
        net.controlnet_cond_embedding = nn.Identity()
        inputs = family.denoiser_inputs(checkpoint, generator)
        latents = torch.randn(2, int(self.config.get("in_channels", 4)), *inputs["sample"].shape[2:])
        inputs["sample"] = latents.normal_(generator=generator)
        width = int(self.config.get("block_out_channels", [320])[0])
        control = torch.randn(2, width, *latents.shape[2:], generator=generator)
        vectors = {each: inputs[each] for each in family.vectors if each in inputs}
        first = ("sample", "timestep", "encoder_hidden_states")
        example = {**{each: inputs[each] for each in first}, "control": control, **vectors}
        axes = {**denoiser_axes(example), "control": LATENT_AXES}
        residuals = {f"residual_{number}": shape for number, shape in enumerate(residual_shapes(self.config))}
        roles = Roles(
            "sample",
            next(iter(residuals)),
            ("encoder_hidden_states", *vectors),
            ("timestep",),
            tuple(vectors),
            beside=("control",),
            residuals=residuals,
        )
        keep = frozenset({"timestep", "time_ids"})
        return Component(self.body, ControlNetBody(net).eval(), example, axes, tuple(residuals), keep, roles)


@dataclass(frozen=True)
class ControlNets(Adapter):
    """Checked ControlNets of a source: components of their own, and one twin of the denoiser for all.

    Attributes:
        nets: The ControlNets.
        family: That of the source.
        shapes: Residuals that the denoiser takes.
    """

    nets: tuple[ControlNet, ...]
    family: Family
    shapes: tuple[Shape, ...]

    @property
    def fingerprint(self) -> str:
        """The digest of each."""
        return "".join(f"\0controlnet\0{net.digest}" for net in self.nets)

    @property
    def components(self) -> tuple[str, ...]:
        """Of each ControlNet the embedding of the control image, and the rest."""
        return tuple(name for net in self.nets for name in (net.image, net.body))

    def stages(self, name: str) -> tuple[str, ...]:
        """Those of a denoiser, for all but the embedding."""
        return tuple(f"{name}_{stage}" for stage in STAGES) if any(name == net.body for net in self.nets) else ()

    @property
    def twins(self) -> tuple[str, ...]:
        """The denoiser that takes the sums of residuals."""
        return (controlled(self.family.denoiser),)

    def derive(self, whole: Graph, step: Graph, directory: Path) -> Mapping[str, Graph]:
        """Graphs of the denoiser with the residuals as further inputs."""
        return export_controlled(controlled(self.family.denoiser), self.shapes, whole, step, directory)

    def component(self, model: AdaptedCheckpoint, name: str, generator: torch.Generator) -> Component:
        """A part of one ControlNet, or the twin."""
        for net in self.nets:
            if name == net.image:
                return net.image_component(model, generator)
            if name == net.body:
                return net.body_component(model, self.family, generator)
        denoiser = self.family.denoiser
        return controlled_component(model.load_component(denoiser), model.configs[denoiser], self.shapes, generator)

    def ranges(self, plain: Mapping[str, Mapping[str, Range]]) -> Mapping[str, Mapping[str, Range]]:
        """Those of the denoiser's stages, with a height and a width for each level of residuals."""
        prompt, schedule, step = (plain[stage] for stage in self.family.stages())
        levels = with_levels(step, self.shapes)
        found: dict[str, Mapping[str, Range]] = {f"{twin}_{STAGES[-1]}": levels for twin in self.twins}
        for net in self.nets:
            found[net.image] = plain["vae_encoder"]  # the same pixels
            found |= dict(zip(self.stages(net.body), (prompt, schedule, levels), strict=True))
        return found


def _check_unet(name: str, config: Mapping[str, Any], source: Source) -> None:
    """Check that a ControlNet is a copy of half of the source's U-Net, and of a kind that is supported.

    Raises:
        SourceError: naming the first entry that does not fit.
    """
    where, unet = f"{name}/config.json", source.configs[source.family.denoiser]
    for key, default in _AGREED.items():
        own, other = config.get(key, default), unet.get(key, default)
        if own != other:
            raise SourceError(
                f"{where}: {key!r} is {own!r}, but that of {source.name} is {other!r}; "
                "the ControlNet is one for another model"
            )
    if residual_shapes(config) != residual_shapes(unet):
        raise SourceError(f"{where}: its layers are not those of {source.name}, it is one for another model")
    channels = natural(name, config, "in_channels", 4)
    latents = natural("vae", source.configs["vae"], "latent_channels", 4)
    if channels != latents:
        raise SourceError(f"{where}: 'in_channels' is {channels}, but latents of {source.name} have {latents}")
    if config.get("global_pool_conditions"):
        raise SourceError(f"{name} pools its residuals over the whole image, which is not supported")
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"):
        if config.get(key) is not None:
            raise SourceError(f"{where}: {key!r} is {config[key]!r}, which is not supported")


def _check_image(name: str, config: Mapping[str, Any], source: Source) -> None:
    """Check that a ControlNet takes an image, and makes it as small as the source's latents.

    Raises:
        SourceError: naming the first entry that does not fit.
    """
    where = f"{name}/config.json"
    if natural(name, config, "conditioning_channels", 3) != 3:
        raise SourceError(f"{where}: 'conditioning_channels' is {config['conditioning_channels']}, expected 3")
    order = config.get("controlnet_conditioning_channel_order", "rgb")
    if order not in ("rgb", "bgr"):
        raise SourceError(f"{where}: 'controlnet_conditioning_channel_order' is {order!r}, expected rgb or bgr")
    key = "conditioning_embedding_out_channels"
    widths = naturals(name, config, key, [16, 32, 96, 256], _MOST_LEVELS, _MOST_WIDTH)
    factor, expected = 2 ** (len(widths) - 1), latent_factor(source.configs["vae"])
    if factor != expected:
        raise SourceError(
            f"{where}: a control image is made {factor} times smaller, but latents of {source.name} are "
            f"{expected} times smaller"
        )


def _build(config: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = ControlNetModel(**known(config, ControlNetModel))
    return model
