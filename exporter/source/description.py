"""A model without its weights: classes, configurations, scheduler, tokenizers and licence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.runtime.bundle.manifest import PREDICTION_TYPES
from latentrt.runtime.samplers import default_sampler

from ..families import PIPELINES, Family
from .links import check_links
from .weights import MAX_JSON, first_line, read_json

SCHEDULER = "scheduler/scheduler_config.json"
"""Where a diffusers directory has its scheduler."""

_MAX_INTEGER = 10**6
_MAX_LIST = 64
_MAX_LAYERS = 256
_MAX_LAYERS_PER_BLOCK = 16
_MAX_NESTING = 16
_MAX_TOKENIZER_FILE = 64 * 2**20
_PROBE_STEPS = 10


@dataclass(frozen=True)
class TokenizerFolder:
    """Where a tokenizer is.

    Attributes:
        path: Folder of its files.
        padding: Token to pad with in place of the one that the files name.
    """

    path: Path
    padding: str | None = None

    def files(self) -> list[Path]:
        """Its files, sorted.

        Raises:
            SourceError: if one is larger than any tokenizer's.
        """
        files = [file for file in sorted(self.path.glob("*")) if file.is_file()]
        for file in files:
            if file.stat().st_size > _MAX_TOKENIZER_FILE:
                raise SourceError(f"{self.path.name}/{file.name} has over {_MAX_TOKENIZER_FILE // 2**20} MiB")
        return files


@dataclass(frozen=True)
class Description:
    """A model without its weights.

    Attributes:
        index: ``model_index.json``.
        family: The family that it names.
        configs: ``config.json`` by part.
        scheduler: ``scheduler_config.json``, without a bound that diffusers writes as ``-Infinity``.
        tokenizers: Where its tokenizers are.
        licence: The licence that the model card names, or ``"unknown"``.
    """

    index: Mapping[str, Any]
    family: Family
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, TokenizerFolder]
    licence: str

    @classmethod
    def read(cls, path: Path, name: str) -> Description:
        """Read a diffusers directory.

        Args:
            path: The directory.
            name: Its name in messages.

        Raises:
            SourceError: naming the first thing that is missing, unknown or absurd.
        """
        check_links(path, ())
        index = read_json(path / "model_index.json", "the directory is not a diffusers pipeline")
        family = family_of(index, name)
        check_links(path, (*family.parts, *family.tokenizers, "scheduler"))
        configs = {part: read_json(path / part / "config.json", f"{part} is incomplete") for part in family.parts}
        scheduler = read_json(path / SCHEDULER, "the scheduler is missing")
        tokenizers = {name: TokenizerFolder(path / name) for name in family.tokenizers}
        return cls.checked(index, family, configs, scheduler, tokenizers, licence_of(path))

    @classmethod
    def checked(
        cls,
        index: Mapping[str, Any],
        family: Family,
        configs: Mapping[str, Mapping[str, Any]],
        scheduler: Mapping[str, Any],
        tokenizers: Mapping[str, TokenizerFolder],
        licence: str,
    ) -> Description:
        """Make one whose numbers are plausible and fit each other; takes the attributes.

        Raises:
            SourceError: naming the first number that is not.
        """
        for name, config in configs.items():
            check_bounds(config, f"{name}/config.json")
        family.check(configs)
        return cls(index, family, configs, _scheduler(dict(scheduler), family), tokenizers, licence)


def check_bounds(value: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Refuse numbers that no model has, before a constructor loops over them.

    Raises:
        SourceError: naming the first.
    """
    if depth > _MAX_NESTING:
        raise SourceError(f"{where} is nested more than {_MAX_NESTING} levels deep, which no configuration is")
    if isinstance(value, dict):
        for name, item in value.items():
            check_bounds(item, where, str(name), depth + 1)
    elif isinstance(value, list):
        if len(value) > _MAX_LIST:
            raise SourceError(f"{where}: {key!r} has {len(value)} entries, at most {_MAX_LIST} are plausible")
        for item in value:
            check_bounds(item, where, key, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = _MAX_LAYERS if "layers" in key else _MAX_INTEGER
        limit = _MAX_LAYERS_PER_BLOCK if "layers_per_block" in key else limit
        if not -limit <= value <= limit:  # also when it is NaN, or an integer beyond the floating-point numbers
            raise SourceError(f"{where}: {key!r} is {value}, which no model has (at most {limit})")


def _scheduler(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Refuse an unknown class of scheduler, and values from which no sampler can be compiled."""
    if config.get("lambda_min_clipped") == -math.inf:  # "no bound", which JSON proper cannot say
        del config["lambda_min_clipped"]
    prediction = config.get("prediction_type", family.prediction)
    if prediction not in PREDICTION_TYPES:
        raise SourceError(
            f"{SCHEDULER}: 'prediction_type' is {prediction!r}, expected one of {', '.join(PREDICTION_TYPES)}"
        )
    try:
        json.dumps(config, allow_nan=False)
        family.compile_plan(config, default_sampler(config), _PROBE_STEPS)
    except (InvalidRequestError, ValueError, RecursionError) as error:  # the source's fault, not the caller's
        raise SourceError(f"{SCHEDULER}: {first_line(error)}") from error
    return config


def family_of(index: Mapping[str, Any], name: str) -> Family:
    """The family that a ``model_index.json`` names.

    Raises:
        SourceError: if it is none that is known, or one of its parts has another class than its own.
    """
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise SourceError(f"{name} is a {pipeline!r}; supported pipelines: {', '.join(PIPELINES)}")
    family = PIPELINES[pipeline].variant(index)
    classes = {part: each.classes for part, each in family.parts.items()}
    classes |= {tokenizer: each.classes for tokenizer, each in family.tokenizers.items()}
    for part, expected in classes.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in expected:
            raise SourceError(f"{part} of {name} has the class {found!r}, expected {' or '.join(expected)}")
    return family


def licence_of(path: Path) -> str:
    """The ``license:`` line of a model card's front matter."""
    card = path / "README.md"
    if card.is_file() and card.stat().st_size < MAX_JSON:
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
            if line.startswith("license:"):
                return line.partition(":")[2].strip()[:200] or "unknown"
    return "unknown"
