"""The manifest of a bundle as frozen dataclasses, and as the JSON text of ``bundle.json``.

:mod:`latentrt.runtime.bundle.manifest_reading` reads that text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from latentrt.engines.base import TensorSpec
from latentrt.engines.errors import BundleError

FORMAT_VERSION = 2
"""The format of ``bundle.json`` that this version writes, and the newest that it reads."""

MANIFEST_FILE = "bundle.json"
"""Name of the manifest inside a bundle."""

ENGINES_DIRECTORY = "engines"
"""Folder of compiled engines inside a bundle; its files have records of their own and are not in the manifest."""

TOKENIZER_FILE = "tokenizer.json"
"""Name of the tokenizer's file in a tokenizer's directory."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int8-weights")
"""Precisions that a graph may be of, the highest first."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
"""Kinds of prediction of a denoiser, as diffusers' ``scheduler_config.json`` names them."""

MAX_JSON_BYTES = 4 << 20
"""Largest manifest that is read; a bundle of Stable Diffusion needs about 20 kB."""

TINY_DECODER = "vae_decoder_tiny"
"""The component of a tiny autoencoder's decoder, which takes latents as the denoiser has them."""

VAE_ENCODER = "vae_encoder"
"""The component that encodes images as latents, which not every request needs."""

STAGES = ("prompt", "schedule", "step")
"""Stages of a denoiser; each is a component named after the denoiser, such as ``unet_step``."""

IMAGE_ENCODER = "image_encoder"
"""The component that encodes an image as tokens of a prompt, for an IP-Adapter."""

SAFETY_CHECKER = "safety_checker"
"""The component that finds images unsafe, which only requests that ask for it need."""

CONTROLNET = "controlnet_"
"""Prefix of the name of a ControlNet's component; the ControlNet's own name follows."""

CONTROL_NAME = r"[a-z0-9][a-z0-9-]{0,39}"
"""Regular expression that the name of a ControlNet matches."""


def controlled(denoiser: str) -> str:
    """Name of the twin of a denoiser that takes the residuals of ControlNets."""
    return f"{denoiser}_control"


@dataclass(frozen=True)
class Graph:
    """One ONNX graph of a component.

    Attributes:
        file: The ONNX file; like all paths here relative to the bundle, with ``/`` between its parts.
        precision: One of :data:`PRECISIONS`.
        opset: Version of the ONNX operator set.
        inputs: Inputs of the graph.
        outputs: Outputs of the graph.
        external: Files of weights that the graph may name as external data.
    """

    file: str
    precision: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    external: tuple[str, ...] = ()


@dataclass(frozen=True)
class Component:
    """A part of the model, e.g. ``unet``, with its graphs by the name of their form, e.g. ``opset20-fp32``."""

    name: str
    graphs: Mapping[str, Graph]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (64 lower-case hexadecimal digits) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Latent:
    """The latent space.

    Attributes:
        channels: Channels of a latent, 1 to 128.
        vae_scale_factor: Pixels along one side of the image for one latent element; a power of two up to 64.
        scaling: Factor that the autoencoder's latents are multiplied by before diffusion.
        shift: Number that is subtracted from them before that.
    """

    channels: int
    vae_scale_factor: int = field(metadata={"key": "factor"})
    scaling: float
    shift: float


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.

    Attributes:
        directory: Directory of its ``tokenizer.json``.
        max_length: Tokens that a prompt is padded to.
        pad_token_id: The padding's id.
        kind: A key of :data:`latentrt.runtime.text.tokenizers.TOKENIZERS`.
    """

    directory: str
    max_length: int
    pad_token_id: int
    kind: str = "clip"


@dataclass(frozen=True)
class Defaults:
    """Options of a request that names none. ``width`` and ``height`` are in pixels."""

    sampler: str
    steps: int
    guidance: float
    width: int
    height: int
    clip_skip: int


@dataclass(frozen=True)
class Adapter:
    """A LoRA that was fused into the weights: the file's name, its SHA-256, and its scale."""

    name: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class Source:
    """The model that a bundle was built from: name, licence, fingerprint of the weights, and LoRAs fused into them."""

    name: str
    licence: str
    fingerprint: str
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The content of ``bundle.json``.

    Attributes:
        format_version: :data:`FORMAT_VERSION` of the writer.
        family: Architecture, a key of :data:`latentrt.runtime.families.FAMILIES`.
        prediction_type: One of :data:`PREDICTION_TYPES`.
        components: Parts of the model by name, e.g. ``text_encoder``, ``unet``, ``unet_step``, ``vae_decoder``.
        files: Every file of the bundle by path, but for the manifest itself and compiled engines.
        latent: The latent space.
        tokenizers: Tokenizers by name.
        scheduler: The model's ``scheduler_config.json``.
        defaults: Options of a request that names none.
        source: The model that the bundle was built from.
        tools: Versions of the tools that made it, by name.
        quality: Figures measured when it was built, e.g. PSNR in decibels by graph.
        settings: Facts of this very model that its family needs; see :attr:`latentrt.runtime.families.Family.settings`.
    """

    format_version: int
    family: str
    prediction_type: str
    components: Mapping[str, Component]
    files: Mapping[str, FileEntry]
    latent: Latent
    tokenizers: Mapping[str, Tokenizer]
    scheduler: Mapping[str, Any]
    defaults: Defaults
    source: Source
    tools: Mapping[str, str]
    quality: Mapping[str, float]
    settings: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as JSON: the same text for the same content, keys sorted, a newline at the end.

        Raises:
            BundleError: for a value that JSON cannot hold, such as NaN.
        """
        try:
            return json.dumps(_plain(self), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise BundleError(f"the manifest cannot be written as JSON: {error}") from error


def _plain(value: object) -> object:
    """Dataclasses and mappings to dictionaries, tuples to lists, all the way down."""
    if is_dataclass(value):
        return {each.metadata.get("key", each.name): _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
