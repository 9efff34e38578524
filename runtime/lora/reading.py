"""LoRA files: read without torch, and checked against the model that they are for.

Hu et al. 2021 (arXiv 2106.09685): a layer's weight W becomes W + scale * alpha / rank * B A, with A (``down``) of shape
``[rank, in]`` and B (``up``) of shape ``[out, rank]``. For a convolution A has the kernel, and B is one by one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from latentrt.engines.checks import is_number, show
from latentrt.engines.errors import InvalidRequestError, SourceError

from ..engine_calls import Floats
from ..files import stored_tensors
from .names import ALPHA, DOWN, UP, Layers, other_kind, split_name, split_part
from .transformers import model_of

Shapes: TypeAlias = Mapping[str, tuple[int, ...] | None]
"""Shapes of the weights that a LoRA may change, by path; ``None`` for a layer that cannot be changed alone."""

MAX_FILE = 4 << 30
"""Largest file that is read, in bytes; LoRAs of the largest models have a few hundred MB."""

_MAX_HEADER = 100 << 20  # bytes; the safetensors library has the same limit
_MOST_TENSORS = 100_000
_MOST_FILES = 100
_LARGEST_SCALE = 100.0
_PART = 1 << 14  # numbers of a weight that are computed at a time, at least
_PRODUCT = 1 << 18  # multiplications up to which OpenBLAS starts no threads, which would wait for each other
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that a caller gives.

    Attributes:
        path: Its safetensors file.
        scale: Factor on what it adds, other than 0.

    Raises:
        InvalidRequestError: if the scale is 0, too large, or no finite number.
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
        """Read ``FILE`` or ``FILE:SCALE``; a last part that is no number belongs to the file's name.

        Raises:
            InvalidRequestError: if the scale is 0 or too large.
        """
        file, colon, scale = text.rpartition(":")
        try:
            return cls(Path(file), float(scale)) if colon and file else cls(Path(text))
        except ValueError as error:
            if isinstance(error, InvalidRequestError):
                raise
            return cls(Path(text))  # a colon of the file's name


Loras: TypeAlias = Sequence["LoraFile | str | os.PathLike[str] | tuple[str | os.PathLike[str], float]"]
"""LoRAs in the form of a caller: files, alone or each with its scale."""


def lora_files(given: Any) -> list[LoraFile]:
    """Read what a caller gives for LoRAs; those with the scale 0 are left out.

    Raises:
        InvalidRequestError: if it is no list of files and scales.
    """
    if isinstance(given, (str, bytes, os.PathLike)) or not isinstance(given, Sequence):
        raise InvalidRequestError(f"loras is a {type(given).__name__}, expected a list of files, or of (file, scale)")
    if len(given) > _MOST_FILES:
        raise InvalidRequestError(f"loras has {len(given)} entries, at most {_MOST_FILES} are taken")
    found = []
    for each in given:
        if isinstance(each, LoraFile):
            found.append(each)
            continue
        file, scale = each if isinstance(each, (tuple, list)) and len(each) == 2 else (each, 1.0)
        is_scale = is_number(scale) or isinstance(scale, float)  # NaN too, which LoraFile refuses
        if not isinstance(file, (str, os.PathLike)) or not is_scale:
            raise InvalidRequestError(f"loras has {show(each)}, expected a file, or (file, scale)")
        if scale != 0:
            found.append(LoraFile(Path(file), float(scale)))
    return found


@dataclass(frozen=True)
class AppliedLora:
    """The record of a LoRA that images were drawn with.

    Attributes:
        path: The file's name, as the caller gave it.
        sha256: SHA-256 of the content, 64 lower-case hexadecimal digits.
        scale: Factor on what it adds.
    """

    path: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class Factors:
    """The two factors of what a LoRA adds to one layer.

    Attributes:
        down: float32 ``[rank, in]``, or ``[rank, in, h, w]`` for a convolution.
        up: float32 ``[out, rank]``, or ``[out, rank, 1, 1]``.
        scale: Factor on their product, alpha over rank, without the scale that the caller gives.
    """

    down: Floats
    up: Floats
    scale: float

    def add_to(self, weight: Floats, scale: float, *, transposed: bool = False) -> bool:
        """Add their product times a scale to a weight, in place.

        The work is done in parts that stay in the processor's caches: fresh memory for the whole product takes longer
        than computing it.

        Args:
            weight: float32, contiguous, in the layer's own shape.
            scale: The scale that the caller gives.
            transposed: Whether the weight is a matrix ``[in, out]``.

        Returns:
            Whether all of the weight is finite afterwards.
        """
        up, down = self.up.reshape(len(self.up), -1), self.down.reshape(len(self.down), -1)
        scaled = up * np.float32(self.scale * scale)
        left, right = (down.T, scaled.T) if transposed else (scaled, down)
        matrix, finite = weight.reshape(len(left), -1), True
        rows = max(1, max(_PART, _PRODUCT // scaled.shape[1]) // matrix.shape[1])
        for first in range(0, len(matrix), rows):
            part = matrix[first : first + rows]
            part += left[first : first + rows] @ right
            finite = finite and math.isfinite(part.min()) and math.isfinite(part.max())
        return finite


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits a model.

    Attributes:
        applied: The record of the file, and its scale.
        factors: The factors by part of the model, then by the path of a layer in it.
    """

    applied: AppliedLora
    factors: Mapping[str, Mapping[str, Factors]] = field(repr=False)

    @property
    def name(self) -> str:
        """The file's name without its directory."""
        return Path(self.applied.path).name

    def add_to(self, part: str, path: str, weight: Floats, *, transposed: bool = False) -> None:
        """Add this LoRA to a layer's weight, in place.

        Args:
            part: Part of the model.
            path: A layer that the LoRA changes.
            weight: float32, contiguous, in the layer's own shape.
            transposed: Whether the weight is a matrix ``[in, out]``.

        Raises:
            SourceError: if the weight is not finite afterwards.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            finite = self.factors[part][path].add_to(weight, self.applied.scale, transposed=transposed)
        if not finite:
            raise SourceError(f"with {self.name} the weights of {part}.{path} are not finite")


@dataclass(frozen=True)
class Target:
    """The model that a LoRA is to change.

    Attributes:
        name: Its name in messages.
        denoiser: The part that layers without a part's name belong to.
        parts: Names of its parts.
        shapes: Gives the shapes of a part's layers.
    """

    name: str
    denoiser: str
    parts: Collection[str]
    shapes: Callable[[str], Shapes]


def read_lora(target: Target, file: LoraFile) -> Lora:
    """Read a LoRA, and check it against the model.

    Args:
        target: The model.
        file: The file, and its scale.

    Raises:
        SourceError: if the file is missing, damaged, no LoRA, or one for another model.
    """
    name = file.path.name
    content = _content(file.path)
    digest = hashlib.sha256(content).hexdigest()
    tensors: dict[str, dict[str, Floats]] = {}
    metadata, found = _tensors(content, name)
    alphas = _Alphas.of(metadata, name)
    for each, tensor in found:
        if kind := other_kind(each):
            raise SourceError(f"{name} has {kind} ({each}), and only plain LoRA can be fused")
        split = split_name(each)
        if split is None:
            raise SourceError(f"{name} is no LoRA that is known: {each!r} is none of its tensors")
        layer, role = split
        if tensor is None or not np.isfinite(tensor).all():
            raise SourceError(f"{name}: the tensor {each!r} holds NaN or infinity, or no floating-point numbers")
        if role in tensors.setdefault(layer, {}):
            raise SourceError(f"{name}: {layer!r} has two tensors {role!r}")
        tensors[layer][role] = tensor
    if not tensors:
        raise SourceError(f"{name} holds no tensors")
    applied = AppliedLora(os.fspath(file.path), digest, file.scale)
    return Lora(applied, _fitted(target, name, tensors, alphas))


def _content(path: Path) -> bytes:
    """All bytes of a file whose name and header may be those of a LoRA."""
    if not path.is_file():
        raise SourceError(f"the LoRA {str(path)!r} {'is no file' if path.exists() else 'does not exist'}")
    if path.suffix != ".safetensors":
        raise SourceError(
            f"{path.name} does not end with .safetensors; other files of weights can run code when loaded"
        )
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):  # before anything else is read
                raise SourceError(f"{path.name} is damaged: its header claims {length:,} bytes of a file of {size:,}")
            if size > MAX_FILE:
                raise SourceError(f"{path.name} has {size:,} bytes, and a LoRA has at most {MAX_FILE:,}")
            return prefix + stream.read(size - 8)
    except OSError as error:
        raise SourceError(f"the LoRA {str(path)!r} cannot be read: {error.strerror or error}") from error


def _tensors(content: bytes, name: str) -> tuple[Mapping[str, str], Iterator[tuple[str, Floats | None]]]:
    """The metadata of a file, and its tensors as float32; ``None`` for one of no floating-point type."""
    try:
        found = stored_tensors(content)
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        metadata = header.get("__metadata__") or {}
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name} is damaged: {error}") from error
    if len(found) > _MOST_TENSORS:
        raise SourceError(f"{name} has {len(found)} tensors, at most {_MOST_TENSORS} are plausible")
    return metadata, ((each.name, each.floats()) for each in found)


def _fitted(
    target: Target, name: str, tensors: Mapping[str, Mapping[str, Floats]], alphas: _Alphas
) -> dict[str, dict[str, Factors]]:
    """Factors by part and path, for layers that the model has and whose shapes fit."""
    found: dict[str, dict[str, Factors]] = {}
    skeletons: dict[str, tuple[Layers, Shapes]] = {}
    for layer, roles in sorted(tensors.items()):  # in one order, so that a message always names the same layer
        part, flat = split_part(layer, target.parts, target.denoiser)
        if part not in target.parts:
            raise SourceError(f"{name} changes {part}, which {target.name} does not have{_hint(tensors)}")
        if part not in skeletons:
            shapes = target.shapes(part)
            skeletons[part] = Layers(shapes), shapes
        layers, shapes = skeletons[part]
        place = layers.find(flat)
        if place is None:
            raise SourceError(f"{name} changes {layer}, a layer that {target.name} does not have{_hint(tensors)}")
        sizes: list[tuple[int, ...]] = []
        for path in place.paths:
            shape = shapes[path]
            if shape is None:
                raise SourceError(
                    f"{name} changes {part}.{path}, whose weights are equal to another layer's and cannot be changed "
                    "alone once the model is exported; fuse the LoRA when the bundle is built"
                )
            sizes.append(shape)
        if DOWN not in roles or UP not in roles:
            raise SourceError(f"{name}: {layer!r} has one of its two factors alone, the file is incomplete")
        down, up = roles[DOWN], roles[UP]
        rows = [size[0] for size in sizes]
        whole = f"{part}.{' and '.join(place.paths)}"
        _check_shapes(target, name, whole, down, up, (sum(rows), *sizes[0][1:]), _hint(tensors))
        for path, own in zip(place.paths, place.divide(up, rows), strict=True):
            if path in found.setdefault(part, {}):
                raise SourceError(f"{name} changes {part}.{path} twice, under two names")
            found[part][path] = Factors(down, own, alphas.scale(part, path, len(down), roles.get(ALPHA), name))
    return found


def _check_shapes(
    target: Target, name: str, layer: str, down: Floats, up: Floats, shape: tuple[int, ...], hint: str
) -> None:
    rank = len(down) if down.ndim else 0
    fits = (
        rank > 0
        and up.ndim >= 2
        and down.ndim >= 2
        and up.shape[:2] == (shape[0], rank)
        and up.size == shape[0] * rank
        and down.shape[1] == shape[1]
        and down.size == rank * math.prod(shape[1:])
    )
    if not fits:
        raise SourceError(
            f"{name} has factors of the shapes {list(down.shape)} and {list(up.shape)} for {layer}, whose weight in "
            f"{target.name} is {list(shape)}{hint}"
        )


def _hint(tensors: Mapping[str, Mapping[str, Floats]]) -> str:
    """The model that a file was made for, by its layers' names or the width of the text states they attend to."""
    for layer, roles in tensors.items():
        if model := model_of(layer):
            return f"; its layers have the names of {model}'s"
        if (
            layer.endswith(("attn2_to_k", "attn2.to_k", "attn2.processor.to_k"))
            and DOWN in roles
            and roles[DOWN].ndim > 1
        ):
            width = int(roles[DOWN].shape[1])
            known = f", as those of {_WIDTHS[width]}" if width in _WIDTHS else ""
            return f"; it was made for a model whose texts are {width} wide{known}"
    return "; it was made for another model"


@dataclass(frozen=True)
class _Alphas:
    """Alphas that PEFT's metadata give in place of tensors.

    Attributes:
        values: Entries of ``lora_adapter_metadata``, which diffusers writes into a file's header, by name.
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

    def scale(self, part: str, path: str, rank: int, alpha: Floats | None, name: str) -> float:
        """Alpha over rank: the tensor's, else the metadata's, else 1."""
        if alpha is not None:
            if alpha.size != 1:
                raise SourceError(f"{name}: the alpha of {part}.{path} has {alpha.size} numbers, expected one")
            return float(alpha.item()) / rank
        value = next(self._patterns(part, path), self.values.get(f"{part}.lora_alpha", rank))
        if not is_number(value):
            raise SourceError(f"{name}: the alpha of {part}.{path} is {value!r}, expected a number")
        return float(value) / (math.sqrt(rank) if self.values.get(f"{part}.use_rslora") else rank)

    def _patterns(self, part: str, path: str) -> Iterator[Any]:
        """Alphas of layers by the ends of their paths."""
        patterns = self.values.get(f"{part}.alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if f".{path}".endswith(f".{pattern}"):
                yield value
