"""A tiny autoencoder's decoder beside the model's own: fast and less exact, for previews or in its place.

Ollin Boer Bohan's TAESD (https://github.com/madebyollin/taesd) and its relatives, diffusers' ``AutoencoderTiny``. Each
is made for the latents of one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from latentrt.engines.checks import check_number
from latentrt.engines.errors import SourceError
from latentrt.engines.trt import Range
from latentrt.runtime.bundle.manifest import TINY_DECODER, Latent

from ..components import AdaptedCheckpoint, Adapter, Component
from ..families.checks import natural, naturals
from ..families.parts import LATENT_AXES, known
from ..source.description import check_bounds
from ..source.source import Source
from ..source.weights import assign, empty_module, read_json, read_weights, weight_files
from .base import AdapterFiles, Option, content_digest, require_directory

_CLASS = "AutoencoderTiny"
_STEM = "diffusion_pytorch_model"
_MOST_LEVELS, _MOST_WIDTH, _MOST_BLOCKS = 7, 10**4, 64
_LARGEST_SCALE = 1e6


@dataclass(frozen=True)
class TinyVaeFiles(AdapterFiles):
    """A tiny autoencoder to build in.

    Attributes:
        path: A diffusers directory of the autoencoder alone.
    """

    title: ClassVar[str] = "a tiny VAE"
    options: ClassVar[tuple[Option, ...]] = (
        Option("--tiny-vae", "DIR", "AutoencoderTiny, whose decoder draws previews or, if asked, images"),
    )
    path: Path

    @classmethod
    def parse(cls, values: Mapping[str, Sequence[str]]) -> Self | None:
        """The directory."""
        paths = values.get("tiny_vae", ())
        return cls(Path(paths[-1])) if paths else None

    def open(self, source: Source) -> TinyVae:
        """Check the directory, and that it decodes the latents of the source."""
        return TinyVae.open(self.path, source.family.latent(source))


class TinyDecoder(nn.Module):
    """Latents ``[batch, channels, h, w]`` of the denoiser's scale to pixels in about [-1, 1].

    Args:
        vae: The autoencoder.
        scaling: Factor between its own latents and those of the denoiser: 1 for one trained on the denoiser's.
        shift: Number that is subtracted from its own latents before that.
    """

    def __init__(self, vae: nn.Module, scaling: float, shift: float) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling, self.shift = scaling, shift

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Decode to ``[batch, 3, h * factor, w * factor]``."""
        pixels: Tensor = self.vae.decode(latent_sample / self.scaling + self.shift, return_dict=False)[0]
        return pixels


@dataclass(frozen=True)
class TinyVae(Adapter):
    """A checked tiny autoencoder.

    Attributes:
        path: A diffusers directory of the autoencoder alone.
        config: Its ``config.json``.
        latent: The latent space of the model that it decodes for.
        digest: SHA-256 over configuration and weights.
    """

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    latent: Latent
    digest: str

    @classmethod
    def open(cls, path: Path, latent: Latent) -> TinyVae:
        """Check a directory.

        Args:
            path: A diffusers directory of the autoencoder alone.
            latent: The latent space that it has to decode.

        Raises:
            SourceError: if it is no tiny autoencoder, is damaged, or is one for other latents.
        """
        require_directory(path, "tiny VAE")
        config = read_json(path / "config.json", "a directory of an AutoencoderTiny is expected")
        name, where = path.name, f"{path.name}/config.json"
        if config.get("_class_name") != _CLASS:
            raise SourceError(f"{name} is a {config.get('_class_name')!r}, expected {_CLASS}")
        check_bounds(config, where)
        naturals(name, config, "decoder_block_out_channels", [64] * 4, _MOST_LEVELS, _MOST_WIDTH)
        blocks = naturals(name, config, "num_decoder_blocks", [3, 1, 1, 1], _MOST_LEVELS, _MOST_BLOCKS)
        channels = natural(name, config, "latent_channels", 4)
        factor = natural(name, config, "upsampling_scaling_factor", 2) ** (len(blocks) - 1)
        if (channels, factor) != (latent.channels, latent.vae_scale_factor):
            raise SourceError(
                f"{name} decodes latents of {channels} channels, {factor} pixels wide, but those of this model have "
                f"{latent.channels} channels and are {latent.vae_scale_factor} pixels wide"
            )
        for key, default, least in (("scaling_factor", 1.0, 1e-6), ("shift_factor", 0.0, -_LARGEST_SCALE)):
            check_number(f"{where}: {key!r}", config.get(key, default), least, _LARGEST_SCALE, error=SourceError)
        files = (path / "config.json", *weight_files(path, _STEM))
        return cls(path, config, latent, content_digest(files))

    @property
    def fingerprint(self) -> str:
        """The digest alone."""
        return f"\0{self.digest}"

    @property
    def components(self) -> tuple[str, ...]:
        """The decoder."""
        return (TINY_DECODER,)

    def load(self) -> nn.Module:
        """Build it in fp32, on the CPU, in evaluation mode.

        Raises:
            SourceError: if configuration and weights do not fit each other, or a weight is not finite.
        """
        tensors = read_weights(self.path, _STEM)
        name = self.path.name
        model = empty_module(lambda config: AutoencoderTiny(**known(config, AutoencoderTiny)), self.config, name)
        assign(model, tensors, name)
        return model.eval().requires_grad_(False)

    def component(self, model: AdaptedCheckpoint, name: str, generator: torch.Generator) -> Component:
        """The decoder."""
        shift = float(self.config.get("shift_factor", 0.0))
        module = TinyDecoder(self.load(), float(self.config.get("scaling_factor", 1.0)), shift)
        example = {"latent_sample": torch.randn(2, self.latent.channels, 8, 12, generator=generator)}
        return Component(name, module.eval(), example, {"latent_sample": LATENT_AXES}, ("sample",))

    def ranges(self, plain: Mapping[str, Mapping[str, Range]]) -> Mapping[str, Mapping[str, Range]]:
        """Those of the model's own decoder."""
        return {TINY_DECODER: plain["vae_decoder"]}
