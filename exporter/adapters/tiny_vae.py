"""A tiny autoencoder's decoder beside the model's own: fast and less exact, for previews or in its place.

Ollin Boer Bohan's TAESD and its kin, diffusers' ``AutoencoderTiny``. One is made for the latents of one model.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.runtime.bundle.manifest import TINY_DECODER, Latent

from ..components import Component
from ..families.checks import natural
from ..families.parts import LATENT_AXES, known
from ..source.description import check_bounds
from ..source.optimum import GraphFolders
from ..source.source import Source
from ..source.weights import assign, empty_module, read_json, read_weights, weight_files

_CLASS = "AutoencoderTiny"
_STEM = "diffusion_pytorch_model"
_MOST_LEVELS, _MOST_BLOCKS = 7, 64


class TinyDecoder(nn.Module):
    """Latents ``[batch, channels, h, w]`` as the denoiser has them to pixels in about [-1, 1].

    Args:
        vae: The autoencoder.
        scaling: What its own latents are multiplied by before diffusion: 1, as it was trained on the denoiser's.
        shift: What is subtracted from them before that.
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
class TinyVae:
    """A checked tiny autoencoder.

    Attributes:
        path: A diffusers directory of the autoencoder alone.
        config: Its ``config.json``.
        latent: The latent space of the model that it decodes for.
        fingerprint: SHA-256 over configuration and weights.
    """

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    latent: Latent
    fingerprint: str

    @classmethod
    def open(cls, path: Path, latent: Latent) -> TinyVae:
        """Check a directory.

        Raises:
            SourceError: if it is no tiny autoencoder, is damaged, or is one for other latents.
        """
        if not path.is_dir():
            raise SourceError(f"the tiny VAE {str(path)!r} {'is no directory' if path.exists() else 'does not exist'}")
        config = read_json(path / "config.json", "a directory of an AutoencoderTiny is expected")
        name, where = path.name, f"{path.name}/config.json"
        if config.get("_class_name") != _CLASS:
            raise SourceError(f"{name} is a {config.get('_class_name')!r}, expected {_CLASS}")
        check_bounds(config, where)
        widths, blocks = (
            config.get("decoder_block_out_channels", [64] * 4),
            config.get("num_decoder_blocks", [3, 1, 1, 1]),
        )
        for key, values, most in (
            ("decoder_block_out_channels", widths, 10**4),
            ("num_decoder_blocks", blocks, _MOST_BLOCKS),
        ):
            sound = isinstance(values, list) and 1 <= len(values) <= _MOST_LEVELS
            if not sound or any(type(value) is not int or not 1 <= value <= most for value in values):
                raise SourceError(f"{where}: {key!r} is {values!r}, expected 1 to {_MOST_LEVELS} whole numbers")
        channels = natural(name, config, "latent_channels", 4)
        factor = natural(name, config, "upsampling_scaling_factor", 2) ** (len(blocks) - 1)
        if (channels, factor) != (latent.channels, latent.vae_scale_factor):
            raise SourceError(
                f"{name} decodes latents of {channels} channels, {factor} pixels wide, but those of this model have "
                f"{latent.channels} channels and are {latent.vae_scale_factor} pixels wide"
            )
        for key, usual in (("scaling_factor", 1.0), ("shift_factor", 0.0)):
            value = config.get(key, usual)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or (key == "scaling_factor" and value <= 0)
            ):
                raise SourceError(f"{where}: {key!r} is {value!r}, expected a number")
        digest = hashlib.sha256()
        for file in (path / "config.json", *weight_files(path, _STEM)):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return cls(path, config, latent, digest.hexdigest())

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

    def component(self, generator: torch.Generator) -> Component:
        """Its decoder, to be exported.

        Raises:
            SourceError: if it cannot be built.
        """
        shift = float(self.config.get("shift_factor", 0.0))
        module = TinyDecoder(self.load(), float(self.config.get("scaling_factor", 1.0)), shift)
        example = {"latent_sample": torch.randn(2, self.latent.channels, 8, 12, generator=generator)}
        return Component(TINY_DECODER, module.eval(), example, {"latent_sample": LATENT_AXES}, ("sample",))


def with_tiny_vae(source: Source, path: Path | None) -> Source:
    """A source with a tiny decoder beside its own, if there is a ``path`` to one.

    Raises:
        SourceError: if it is none for this source.
        InvalidRequestError: if the source holds graphs that others exported.
    """
    if path is None:
        return source
    if isinstance(source.weights, GraphFolders):
        raise InvalidRequestError(f"{source.name} holds graphs that are run as they are; a tiny VAE goes with weights")
    tiny = TinyVae.open(path, source.family.latent(source))
    digest = hashlib.sha256(f"{source.fingerprint}\0{tiny.fingerprint}".encode())
    return dataclasses.replace(source, tiny_vae=tiny, fingerprint=digest.hexdigest())
