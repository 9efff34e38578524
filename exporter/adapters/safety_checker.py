"""A safety checker beside a model: it looks at finished images, whatever model drew them.

diffusers' ``StableDiffusionSafetyChecker`` compares CLIP's embedding of an image with embeddings of 17 concepts, and of
3 that call for special care (Rando et al. 2022, arXiv 2210.04610, describe it). The graph computes how far each cosine
is above its threshold; :mod:`latentrt.runtime.output.safety_checker` makes the verdict of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from latentrt.engines.checks import is_number
from latentrt.engines.errors import SourceError
from latentrt.engines.trt import Range
from latentrt.runtime.bundle.manifest import SAFETY_CHECKER
from latentrt.runtime.images.clip_vision import DEVIATION, MEAN
from latentrt.runtime.output.safety_checker import CONCEPT_SCORES, SPECIAL_SCORES

from ..components import AdaptedCheckpoint, Adapter, Component
from ..families.checks import natural
from ..source.description import check_bounds
from ..source.links import check_links
from ..source.source import Source
from ..source.weights import opened, read_json, read_weights, weight_files
from .base import AdapterFiles, Option, content_digest, require_directory
from .clip_vision import DEFAULT_SIDE, STEM, check_vision, empty_vision, load_vision

_CLASS = "StableDiffusionSafetyChecker"
_CONCEPTS, _SPECIAL = 17, 3  # as in diffusers
_LEAST_DEVIATION = 1e-6
_EXTRACTOR = "feature_extractor"
_PREPARATION = "preprocessor_config.json"


@dataclass(frozen=True)
class SafetyCheckerFiles(AdapterFiles):
    """A safety checker to build in; it goes with models of every family.

    Attributes:
        path: Its directory, or that of a model that has one as ``safety_checker``.
    """

    title: ClassVar[str] = "a safety checker"
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "--safety-checker",
            "DIR",
            "StableDiffusionSafetyChecker, or a model that has one, for requests that want their images checked",
        ),
    )
    path: Path

    @classmethod
    def parse(cls, values: Mapping[str, Sequence[str]]) -> Self | None:
        """The directory."""
        paths = values.get("safety_checker", ())
        return cls(Path(paths[-1])) if paths else None

    def open(self, source: Source) -> SafetyChecker:
        """Check the directory; the source plays no part."""
        return SafetyChecker.open(self.path)


class SafetyScores(nn.Module):
    """Images ``[batch, 3, side, side]``, normalised, to how far they are above thresholds, ``[batch, concepts]``.

    Embeddings and thresholds of concepts are constants rather than weights. So they stay fp32 at any precision, as do
    the cosines.

    Args:
        tower: CLIP's vision tower with its projection.
        concepts: Embeddings of the concepts ``[concepts, width]``, and of those that call for special care.
        thresholds: Thresholds of both ``[concepts]``.
        mean: Mean of each channel that the tower's images are normalised with, in place of CLIP's.
        deviation: Standard deviation of each channel that they are normalised with.
    """

    def __init__(
        self,
        tower: nn.Module,
        concepts: tuple[Tensor, Tensor],
        thresholds: tuple[Tensor, Tensor],
        mean: tuple[float, ...] = MEAN,
        deviation: tuple[float, ...] = DEVIATION,
    ) -> None:
        super().__init__()
        self.tower: Any = tower
        self.directions = [normalize(each.float()) for each in concepts]
        self.thresholds = [each.float() for each in thresholds]
        # The runtime normalises as CLIP does; a checker that wants other numbers corrects them in its graph.
        self.as_clip = (mean, deviation) == (MEAN, DEVIATION)
        clip, own = (torch.tensor(each, dtype=torch.float64) for each in ((MEAN, DEVIATION), (mean, deviation)))
        self.factor = (clip[1] / own[1]).float()[:, None, None]
        self.shift = ((clip[0] - own[0]) / own[1]).float()[:, None, None]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Compare with the concepts, and with those that call for special care."""
        if not self.as_clip:
            pixel_values = (pixel_values.float() * self.factor + self.shift).to(pixel_values.dtype)
        embedded = normalize(self.tower(pixel_values).image_embeds.float())
        concepts, special = (
            embedded @ direction.T - threshold
            for direction, threshold in zip(self.directions, self.thresholds, strict=True)
        )
        return concepts, special


@dataclass(frozen=True)
class SafetyChecker(Adapter):
    """A checked safety checker.

    Attributes:
        path: Its directory.
        vision: Configuration of its vision tower.
        mean: Mean of each channel that its images are normalised with.
        deviation: Standard deviation of each channel that they are normalised with.
        names: Names of tensors in the files, by their names in the tower or among the concepts.
        assumed: Assumptions, a sentence each.
        digest: SHA-256 over configurations and weights.
    """

    path: Path
    vision: Mapping[str, Any] = field(repr=False)
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    names: Mapping[str, str] = field(repr=False)
    assumed: tuple[str, ...]
    digest: str

    @classmethod
    def open(cls, given: Path) -> SafetyChecker:
        """Check a safety checker, its weights by name, type and shape.

        Args:
            given: Its directory, or that of a model that has one as ``safety_checker``.

        Raises:
            SourceError: if it is none, is damaged, or wants images prepared otherwise than CLIP's.
        """
        require_directory(given, "safety checker")
        path = given / SAFETY_CHECKER if (given / SAFETY_CHECKER).is_dir() else given
        if (path.parent / "model_index.json").is_file():
            check_links(path.parent, (path.name, _EXTRACTOR))
        else:
            check_links(path, ())
        name = path.resolve().name
        config = read_json(path / "config.json", f"a directory of a {_CLASS} is expected, or of a model that has one")
        vision = _vision_config(name, config)
        preparation = next(
            (file for file in (path / _PREPARATION, path.parent / _EXTRACTOR / _PREPARATION) if file.exists()), None
        )
        mean: tuple[float, ...] = MEAN
        deviation: tuple[float, ...] = DEVIATION
        assumed: tuple[str, ...] = ()
        if preparation is None:
            assumed = (f"{name} has no {_PREPARATION}; its images are prepared as CLIP's usually are",)
        else:
            mean, deviation = _preparation(preparation, int(vision.get("image_size", DEFAULT_SIDE)))
        files = weight_files(path, STEM)
        names = _names(name, files, vision)
        read = (path / "config.json", *([] if preparation is None else [preparation]), *files)
        return cls(path, vision, mean, deviation, names, assumed, content_digest(read))

    @property
    def fingerprint(self) -> str:
        """The digest."""
        return f"\0safety-checker\0{self.digest}"

    @property
    def notes(self) -> tuple[str, ...]:
        """How images are prepared, where the checker does not say."""
        return self.assumed

    @property
    def components(self) -> tuple[str, ...]:
        """All of it but the verdict."""
        return (SAFETY_CHECKER,)

    def component(self, model: AdaptedCheckpoint, name: str, generator: torch.Generator) -> Component:
        """All of it but the verdict."""
        stored = read_weights(self.path, STEM)
        tensors = {own: stored[name] for own, name in self.names.items()}
        concepts, special = (tuple(tensors.pop(name) for name in pair) for pair in _pairs())
        tower = load_vision(self.path.resolve().name, self.vision, tensors)
        module = SafetyScores(tower, (concepts[0], special[0]), (concepts[1], special[1]), self.mean, self.deviation)
        side = int(self.vision.get("image_size", DEFAULT_SIDE))
        pixels = torch.randn(2, 3, side, side, generator=generator)
        return Component(
            name,
            module.eval().requires_grad_(False),
            {"pixel_values": pixels},
            {"pixel_values": {0: "batch"}},
            (CONCEPT_SCORES, SPECIAL_SCORES),
        )

    def ranges(self, plain: Mapping[str, Mapping[str, Range]]) -> Mapping[str, Mapping[str, Range]]:
        """Images are checked one by one."""
        return {SAFETY_CHECKER: {"batch": Range.fixed(1)}}


def _pairs() -> tuple[tuple[str, str], tuple[str, str]]:
    """Names of embeddings and thresholds: of concepts, and of those that call for special care."""
    concepts, special = "concept_embeds", "special_care_embeds"
    return (concepts, f"{concepts}_weights"), (special, f"{special}_weights")


def _vision_config(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the vision tower, with the width of its projection."""
    where = f"{name}/config.json"
    if config.get("architectures") != [_CLASS]:
        raise SourceError(f"{where}: 'architectures' is {config.get('architectures')!r}, expected [{_CLASS!r}]")
    check_bounds(config, where)
    # The first versions of transformers wrote both, and read the second.
    key = "vision_config" if config.get("vision_config_dict") is None else "vision_config_dict"
    vision = config.get(key)
    if not isinstance(vision, dict):
        raise SourceError(f"{where}: {key!r} is {vision!r}, expected the configuration of CLIP's vision tower")
    vision = {**vision, "projection_dim": natural(name, config, "projection_dim", 512)}
    check_vision(name, vision)
    return vision


def _preparation(file: Path, side: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that images are normalised with; every other setting must be that of CLIP."""
    config, where = read_json(file, "it says how images are prepared"), f"{file.parent.name}/{file.name}"
    check_bounds(config, where)
    expected: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), (True,)),
        "resample": (3,),  # Pillow's bicubic
        "size": ({"shortest_edge": side}, side),
        "crop_size": ({"height": side, "width": side}, side),
    }
    for key, values in expected.items():
        if config.get(key) is not None and config[key] not in values:
            raise SourceError(f"{where}: {key!r} is {config[key]!r}, which is not supported; expected {values[0]!r}")
    factor = config.get("rescale_factor")
    if factor is not None and not (is_number(factor) and abs(factor * 255 - 1) < 1e-6):  # also when it is NaN
        raise SourceError(f"{where}: 'rescale_factor' is {factor!r}, which is not supported; expected 1/255")
    mean, deviation = (_channels(where, config, *each) for each in (("image_mean", MEAN), ("image_std", DEVIATION)))
    if min(deviation) < _LEAST_DEVIATION:
        raise SourceError(f"{where}: 'image_std' is {list(deviation)}, expected three numbers above zero")
    return mean, deviation


def _channels(where: str, config: Mapping[str, Any], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(is_number(each) for each in value):
        raise SourceError(f"{where}: {key!r} is {value!r}, expected three numbers")
    return tuple(float(each) for each in value)


def _names(name: str, files: list[Path], vision: Mapping[str, Any]) -> dict[str, str]:
    """Names in the files of each tensor that is needed, by the name that it has here; all have the right shape."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        with opened(file) as content:
            for key in content.keys():  # noqa: SIM118
                part = content.get_slice(key)
                if not key.endswith("position_ids") and not part.get_dtype().startswith(("F", "BF")):
                    raise SourceError(
                        f"weights of {name}: {key!r} is {part.get_dtype()}; quantised weights are not supported"
                    )
                found[key] = tuple(part.get_shape())
    tower = empty_vision(name, vision).state_dict()
    expected = {key: tuple(each.shape) for key, each in tower.items()}
    for (embeddings, thresholds), count in zip(_pairs(), (_CONCEPTS, _SPECIAL), strict=True):
        expected |= {embeddings: (count, int(vision["projection_dim"])), thresholds: (count,)}
    # The tower is a model of its own inside the checker, which transformers names twice or once.
    inner = {f"vision_model.{key}": key for key in expected if key.startswith("vision_model.")}
    names = {inner.get(key, key): key for key in found if not key.endswith("position_ids")}
    for key, shape in expected.items():
        if key not in names:
            raise SourceError(f"weights of {name}: {key!r} is missing; expected all of a {_CLASS}")
        if found[names[key]] != shape:
            raise SourceError(
                f"weights of {name}: {names[key]!r} has the shape {list(found[names[key]])}, expected {list(shape)}"
            )
    if unknown := sorted(names.keys() - expected.keys()):
        raise SourceError(f"weights of {name}: {names[unknown[0]]!r} has no place in a {_CLASS}")
    return names
