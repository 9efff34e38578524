"""ControlNets beside a U-Net: what steers it by a picture of edges, depth or poses.

Zhang et al. 2023 (arXiv 2302.05543): a copy of the U-Net's first half sees the latents and a control image, and what it
computes at each level is added to the U-Net's skip connections, and to what its middle computes. Here each of them is
split as the denoiser is, and one stage more, which depends on the control image alone; and the U-Net gets a twin that
takes the sums in and uses the same file of weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.runtime.bundle.manifest import CONTROL_NAME, CONTROLNET

from ..components import Component, Roles
from ..families.base import latent_factor
from ..families.checks import check_blocks, natural
from ..families.parts import LATENT_AXES, denoiser_axes, known
from ..source.description import check_bounds
from ..source.optimum import GraphFolders
from ..source.weights import assign, empty_module, read_json, read_weights, weight_files

if TYPE_CHECKING:
    from ..source.source import Source

_CLASS = "ControlNetModel"
_STEM = "diffusion_pytorch_model"
_MOST_LEVELS, _MOST_WIDTH = 7, 10**4
_MOST_CONTROLNETS = 16
# What a ControlNet and its U-Net must agree in, with the values that diffusers takes where a configuration is silent.
_AGREED: Mapping[str, object] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1280,
    "addition_embed_type": None,
    "projection_class_embeddings_input_dim": None,
    "addition_time_embed_dim": None,
}

Shape = tuple[int, str, str]
"""Channels of a residual, and what its height and width are called."""


@dataclass(frozen=True)
class ControlNetFile:
    """A ControlNet to build in.

    Attributes:
        name: What requests call it: lower-case letters, digits and dashes.
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
        """``NAME=DIR``, or ``DIR``, which is then called as its directory is."""
        name, equals, path = text.partition("=")
        if equals and not Path(text).exists():
            return cls(name, Path(path))
        directory = Path(text)
        return cls(directory.resolve().name.lower().replace("_", "-").replace(".", "-"), directory)


class ControlImage(nn.Module):
    """What depends on the control image alone: ``[batch, 3, H, W]`` from 0 to 1 to the width of the first level.

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
    """What a U-Net takes, and an embedded control image, to a residual for each skip connection and for the middle."""

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
        name: What requests call it.
        path: Its directory.
        config: Its ``config.json``.
        fingerprint: SHA-256 over name, configuration and weights.
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(repr=False)
    fingerprint: str

    @property
    def body(self) -> str:
        """The component that is split into stages."""
        return f"{CONTROLNET}{self.name}"

    @property
    def components(self) -> tuple[str, ...]:
        """Its components, without stages."""
        return f"{self.body}_image", self.body

    @classmethod
    def open(cls, file: ControlNetFile, source: Source) -> ControlNet:
        """Check a directory.

        Raises:
            SourceError: if it is no ControlNet, is damaged, or is one for another model.
        """
        path, where = file.path, f"{file.path.name}/config.json"
        if not path.is_dir():
            state = "is no directory" if path.exists() else "does not exist"
            raise SourceError(f"the ControlNet {str(path)!r} {state}")
        config = read_json(path / "config.json", "a directory of a ControlNetModel is expected")
        if config.get("_class_name") != _CLASS:
            raise SourceError(f"{path.name} is a {config.get('_class_name')!r}, expected {_CLASS}")
        check_bounds(config, where)
        check_blocks(path.name, config)
        unet, vae = source.configs[source.family.denoiser], source.configs["vae"]
        for key, usual in _AGREED.items():
            own, other = config.get(key, usual), unet.get(key, usual)
            if own != other:
                raise SourceError(
                    f"{where}: {key!r} is {own!r}, but that of {source.name} is {other!r}; "
                    "the ControlNet is one for another model"
                )
        if residual_shapes(config) != residual_shapes(unet):
            raise SourceError(f"{where}: its layers are not those of {source.name}, it is one for another model")
        channels, latents = natural(path.name, config, "in_channels", 4), natural("vae", vae, "latent_channels", 4)
        if channels != latents:
            raise SourceError(f"{where}: 'in_channels' is {channels}, but latents of {source.name} have {latents}")
        if natural(path.name, config, "conditioning_channels", 3) != 3:
            raise SourceError(f"{where}: 'conditioning_channels' is {config['conditioning_channels']}, expected 3")
        order = config.get("controlnet_conditioning_channel_order", "rgb")
        if order not in ("rgb", "bgr"):
            raise SourceError(f"{where}: 'controlnet_conditioning_channel_order' is {order!r}, expected rgb or bgr")
        if config.get("global_pool_conditions"):
            raise SourceError(f"{path.name} pools its residuals over the whole picture, which is not supported")
        for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"):
            if config.get(key) is not None:
                raise SourceError(f"{where}: {key!r} is {config[key]!r}, which is not supported")
        widths = config.get("conditioning_embedding_out_channels", [16, 32, 96, 256])
        sound = isinstance(widths, list) and 1 <= len(widths) <= _MOST_LEVELS
        if not sound or any(type(width) is not int or not 1 <= width <= _MOST_WIDTH for width in widths):
            raise SourceError(
                f"{where}: 'conditioning_embedding_out_channels' is {widths!r}, expected 1 to {_MOST_LEVELS} "
                "whole numbers"
            )
        if (factor := 2 ** (len(widths) - 1)) != latent_factor(vae):
            raise SourceError(
                f"{where}: a control image is made {factor} times smaller, but latents of {source.name} are "
                f"{latent_factor(vae)} times smaller"
            )
        digest = hashlib.sha256(file.name.encode())
        for each in (path / "config.json", *weight_files(path, _STEM)):
            with each.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        net = cls(file.name, path, config, digest.hexdigest())
        net._empty()
        return net

    def _empty(self) -> nn.Module:
        # The order of colours is the image stage's matter; diffusers would reverse what comes out of it.
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

    def component(self, source: Source, name: str, generator: torch.Generator) -> Component:
        """One of :attr:`components`, with example inputs drawn from ``generator``.

        Raises:
            SourceError: if it cannot be built.
        """
        net: Any = self.load()
        factor = latent_factor(source.configs["vae"])
        if name != self.body:
            reverse = self.config.get("controlnet_conditioning_channel_order", "rgb") == "bgr"
            module = ControlImage(net.controlnet_cond_embedding, reverse).eval()
            pixels = torch.rand(2, 3, 8 * factor, 12 * factor, generator=generator)
            axes = {0: "batch", 2: "height", 3: "width"}
            return Component(name, module, {"control_image": pixels}, {"control_image": axes}, ("control",))
        net.controlnet_cond_embedding = nn.Identity()
        inputs = source.family.denoiser_inputs(source, generator)
        latents = torch.randn(2, int(self.config.get("in_channels", 4)), *inputs["sample"].shape[2:])
        inputs["sample"] = latents.normal_(generator=generator)
        width = int(self.config.get("block_out_channels", [320])[0])
        control = torch.randn(2, width, *latents.shape[2:], generator=generator)
        vectors = {each: inputs[each] for each in source.family.vectors if each in inputs}
        first = ("sample", "timestep", "encoder_hidden_states")
        example = {**{each: inputs[each] for each in first}, "control": control, **vectors}
        axes_of = {**denoiser_axes(example), "control": LATENT_AXES}
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
        return Component(name, ControlNetBody(net).eval(), example, axes_of, tuple(residuals), keep, roles)


def _build(config: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = ControlNetModel(**known(config, ControlNetModel))
    return model


def with_controlnets(source: Source, files: Sequence[ControlNetFile]) -> Source:
    """A source with ControlNets beside its denoiser.

    Raises:
        SourceError: if one is missing, damaged, or for another model.
        InvalidRequestError: if two have one name, the family takes none, or the source holds graphs of others.
    """
    if not files:
        return source
    if isinstance(source.weights, GraphFolders):
        raise InvalidRequestError(
            f"{source.name} holds graphs that are run as they are; a ControlNet goes with weights"
        )
    if not source.family.controllable:
        raise InvalidRequestError(f"ControlNets for models of the family {source.family.name} are not supported")
    names = [file.name for file in files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidRequestError(f"two ControlNets are called {twice[0]!r}; give each a name as NAME=DIR")
    if len(files) > _MOST_CONTROLNETS:
        raise InvalidRequestError(f"{len(files)} ControlNets are given, at most {_MOST_CONTROLNETS} fit one bundle")
    nets = tuple(ControlNet.open(file, source) for file in files)
    digest = hashlib.sha256(source.fingerprint.encode())
    for net in nets:
        digest.update(f"\0controlnet\0{net.fingerprint}".encode())
    return dataclasses.replace(source, controlnets=nets, fingerprint=digest.hexdigest())


def residual_shapes(config: Mapping[str, Any]) -> tuple[Shape, ...]:
    """The residuals of a U-Net in the order in which diffusers has them: one a skip connection, then the middle's."""
    widths = config.get("block_out_channels", [320, 640, 1280, 1280])
    layers = config.get("layers_per_block", 2)
    counts = layers if isinstance(layers, list) else [layers] * len(widths)
    if len(counts) != len(widths) or any(type(count) is not int or count < 1 for count in counts):
        raise SourceError(f"'layers_per_block' is {layers!r}, expected a whole number, or one for each level")
    found = [_shape(widths[0], 0)]
    for level, (width, count) in enumerate(zip(widths, counts, strict=True)):
        found += [_shape(width, level)] * count
        if level + 1 < len(widths):
            found.append(_shape(width, level + 1))
    return (*found, _shape(widths[-1], len(widths) - 1))


def _shape(width: int, level: int) -> Shape:
    suffix = f"_{level}" if level else ""
    return width, f"latent_height{suffix}", f"latent_width{suffix}"
