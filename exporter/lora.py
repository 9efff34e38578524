"""LoRA files, fused into the weights of a model before it is exported.

Hu et al. 2021 (arXiv 2106.09685): a layer's weight W becomes W + scale * alpha / rank * B A, with A (``down``) of shape
``[rank, in]`` and B (``up``) of shape ``[out, rank]``. For a convolution A has the kernel, and B is one by one. Nothing
of it is left at run time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.runtime.manifest import Adapter

from .graph_folders import GraphFolders
from .lora_names import ALPHA, DOWN, UP, Layers, other_kind, split_name, split_part
from .source import Source
from .weights import empty_module, opened

_MOST_TENSORS = 100_000
_LARGEST_SCALE = 100.0
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to fuse.

    Attributes:
        path: A safetensors file.
        scale: How much of it.
    """

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < abs(self.scale) <= _LARGEST_SCALE:  # also when it is NaN
            raise InvalidRequestError(
                f"the scale of {self.path.name} is {self.scale:g}, expected a number other than 0, "
                f"up to {_LARGEST_SCALE:g}"
            )

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """``FILE`` or ``FILE:SCALE``."""
        file, colon, scale = text.rpartition(":")
        try:
            return cls(Path(file), float(scale)) if colon and file else cls(Path(text))
        except ValueError as error:
            if isinstance(error, InvalidRequestError):
                raise
            return cls(Path(text))  # a colon of the file's name


@dataclass(frozen=True)
class Factors:
    """What is added to one layer.

    Attributes:
        down: fp32 ``[rank, in]``, or ``[rank, in, h, w]`` for a convolution.
        up: fp32 ``[out, rank]``, or with two dimensions of one.
        scale: Factor on their product, without the file's own scale.
    """

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, shape: Sequence[int]) -> Tensor:
        """Their product, in a weight's shape."""
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(*shape) * self.scale


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits a source.

    Attributes:
        adapter: For the manifest.
        factors: By part of the source, then by the path of a layer in it.
    """

    adapter: Adapter
    factors: Mapping[str, Mapping[str, Factors]] = field(repr=False)

    def fuse(self, part: str, module: nn.Module) -> None:
        """Add to the weights of a part.

        Raises:
            SourceError: if a weight is not finite afterwards.
        """
        for path, factors in self.factors.get(part, {}).items():
            layer: Any = module.get_submodule(path)
            weight = layer.weight.detach()
            fused = weight + factors.delta(weight.shape) * self.adapter.scale
            if not bool(torch.isfinite(fused).all()):
                raise SourceError(f"with {self.adapter.name} the weights of {part}.{path} are not finite")
            layer.weight = nn.Parameter(fused, requires_grad=False)


def with_loras(source: Source, files: Sequence[LoraFile]) -> Source:
    """A source whose parts come with LoRAs fused in; every file is read and checked here.

    Raises:
        SourceError: if a file is missing, damaged, no LoRA, or one for another model.
        InvalidRequestError: if the source holds graphs that others exported.
    """
    if not files:
        return source
    if isinstance(source.weights, GraphFolders):
        raise InvalidRequestError(f"{source.name} holds graphs that are run as they are; a LoRA is fused into weights")
    loras = tuple(_read(source, file) for file in files)
    digest = hashlib.sha256(source.fingerprint.encode())
    for lora in loras:
        digest.update(f"\0{lora.adapter.sha256}\0{lora.adapter.scale!r}".encode())
    return dataclasses.replace(source, loras=loras, fingerprint=digest.hexdigest())


def _read(source: Source, file: LoraFile) -> Lora:
    name = file.path.name
    if not file.path.is_file():
        raise SourceError(f"the LoRA {str(file.path)!r} {'is no file' if file.path.exists() else 'does not exist'}")
    if file.path.suffix != ".safetensors":
        raise SourceError(f"{name} does not end with .safetensors; other files of weights can run code when loaded")
    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    tensors: dict[str, dict[str, Tensor]] = {}
    with opened(file.path, name) as content:
        names = list(content.keys())
        if len(names) > _MOST_TENSORS:
            raise SourceError(f"{name} has {len(names)} tensors, at most {_MOST_TENSORS} are plausible")
        alphas = _Alphas.of(content.metadata() or {}, name)
        for each in names:
            if kind := other_kind(each):
                raise SourceError(f"{name} has {kind} ({each}), and only plain LoRA can be fused")
            split = split_name(each)
            if split is None:
                raise SourceError(f"{name} is no LoRA that is known: {each!r} is none of its tensors")
            layer, role = split
            tensor = content.get_tensor(each)
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
                raise SourceError(f"{name}: the tensor {each!r} holds NaN or infinity, or no floating-point numbers")
            if role in tensors.setdefault(layer, {}):
                raise SourceError(f"{name}: {layer!r} has two tensors {role!r}")
            tensors[layer][role] = tensor.float()
    if not tensors:
        raise SourceError(f"{name} holds no tensors")
    return Lora(Adapter(name, digest, file.scale), _fitted(source, name, tensors, alphas))


def _fitted(
    source: Source, name: str, tensors: Mapping[str, Mapping[str, Tensor]], alphas: _Alphas
) -> dict[str, dict[str, Factors]]:
    """Factors by part and path, for layers that the source has and whose shapes fit."""
    denoiser, found = source.family.denoiser, dict[str, dict[str, Factors]]()
    skeletons: dict[str, tuple[Layers, dict[str, tuple[int, ...]]]] = {}
    for layer, roles in tensors.items():
        part, flat = split_part(layer, source.configs, denoiser)
        if part not in source.configs:
            raise SourceError(f"{name} changes {part}, which {source.name} does not have{_hint(tensors)}")
        if part not in skeletons:
            shapes = _shapes(source, part)
            skeletons[part] = Layers(shapes, source.configs[part]), shapes
        layers, shapes = skeletons[part]
        path = layers.find(flat)
        if path is None:
            raise SourceError(f"{name} changes {layer}, a layer that {source.name} does not have{_hint(tensors)}")
        if DOWN not in roles or UP not in roles:
            raise SourceError(f"{name}: {layer!r} has one of its two factors alone, the file is incomplete")
        down, up, shape = roles[DOWN], roles[UP], shapes[path]
        _check_shapes(source, name, f"{part}.{path}", down, up, shape, _hint(tensors))
        if path in found.setdefault(part, {}):
            raise SourceError(f"{name} changes {part}.{path} twice, under two names")
        found[part][path] = Factors(down, up, alphas.scale(part, path, len(down), roles.get(ALPHA), name))
    return found


def _check_shapes(
    source: Source, name: str, layer: str, down: Tensor, up: Tensor, shape: tuple[int, ...], hint: str
) -> None:
    rank = len(down) if down.ndim else 0
    fits = (
        rank > 0
        and up.ndim >= 2
        and down.ndim >= 2
        and up.shape[:2] == (shape[0], rank)
        and up.numel() == shape[0] * rank
        and down.shape[1] == shape[1]
        and down.numel() == rank * math.prod(shape[1:])
    )
    if not fits:
        raise SourceError(
            f"{name} has factors of the shapes {list(down.shape)} and {list(up.shape)} for {layer}, whose weight in "
            f"{source.name} is {list(shape)}{hint}"
        )


def _hint(tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What a file was made for, by the width of the texts that its layers attend to."""
    for layer, roles in tensors.items():
        if (
            layer.endswith(("attn2_to_k", "attn2.to_k", "attn2.processor.to_k"))
            and DOWN in roles
            and roles[DOWN].ndim > 1
        ):
            width = int(roles[DOWN].shape[1])
            known = f", as those of {_WIDTHS[width]}" if width in _WIDTHS else ""
            return f"; it was made for a model whose texts are {width} wide{known}"
    return "; it was made for another model"


def _shapes(source: Source, part: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that a LoRA may change, by path; nothing is allocated."""
    module = empty_module(source.family.parts[part].build, source.configs[part], part)
    return {
        path: tuple(layer.weight.shape)
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


@dataclass(frozen=True)
class _Alphas:
    """Alphas that PEFT's metadata give, in place of tensors.

    Attributes:
        values: What diffusers writes into a file's header, by name.
    """

    values: Mapping[str, Any]

    @classmethod
    def of(cls, metadata: Mapping[str, str], name: str) -> _Alphas:
        try:
            values = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name}: its lora_adapter_metadata are no JSON: {error}") from error
        if not isinstance(values, dict):
            raise SourceError(f"{name}: its lora_adapter_metadata are no JSON object")
        for key, value in values.items():
            if key.rpartition(".")[2] == "use_dora" and value:
                raise SourceError(f"{name} has DoRA, and only plain LoRA can be fused")
        return cls(values)

    def scale(self, part: str, path: str, rank: int, alpha: Tensor | None, name: str) -> float:
        """Alpha over rank: the tensor's, else the metadata's, else 1."""
        if alpha is not None:
            if alpha.numel() != 1:
                raise SourceError(f"{name}: the alpha of {part}.{path} has {alpha.numel()} numbers, expected one")
            return float(alpha.item()) / rank
        value = next(self._patterns(part, path), self.values.get(f"{part}.lora_alpha", rank))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SourceError(f"{name}: the alpha of {part}.{path} is {value!r}, expected a number")
        return value / (math.sqrt(rank) if self.values.get(f"{part}.use_rslora") else rank)

    def _patterns(self, part: str, path: str) -> Iterator[Any]:
        """Alphas of layers by the ends of their paths."""
        patterns = self.values.get(f"{part}.alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if f".{path}".endswith(f".{pattern}"):
                yield value
