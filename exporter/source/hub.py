"""Models on a hub: only configurations, tokenizers and safetensors are fetched, into the hub client's own cache."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentrt.engines.errors import SourceError

from ..families import FAMILIES
from .weights import VARIANTS, first_line

Files = Callable[[str | None], list[str]]
"""Patterns of files for a variant."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)


def repository(path: Path) -> str | None:
    """The name of a model on a hub that a path is, such as ``org/model``; ``None`` if it cannot be one."""
    name = path.as_posix()
    return name if not path.exists() and _NAME.fullmatch(name) else None


def tokenizer_files(variant: str | None = None) -> list[str]:
    """Files of a tokenizer that has a repository of its own."""
    return list(_TOKENIZER)


def config_files(variant: str | None = None) -> list[str]:
    """Files of a diffusers directory without its weights."""
    parts = {name for family in FAMILIES.values() for name in family.parts}
    tokenizers = {name for family in FAMILIES.values() for name in family.tokenizers}
    return [
        *("model_index.json", "README.md", "scheduler/scheduler_config.json"),
        *(f"{name}/config.json" for name in sorted(parts)),
        *(f"{name}/{file}" for name in sorted(tokenizers) for file in _TOKENIZER),
    ]


def model_files(variant: str | None = None) -> list[str]:
    """Files of a diffusers directory."""
    infix = f".{variant}" if variant else VARIANTS[0]
    parts = {(name, part.stem) for family in FAMILIES.values() for name, part in family.parts.items()}
    endings = (f"{infix}.safetensors", f"{infix}-?????-of-?????.safetensors", f".safetensors.index{infix}.json")
    # Shards of a variant are called model.fp16-00001-of-00002, or model-00001-of-00002.fp16 by older versions.
    older = (f"-?????-of-?????{infix}.safetensors",) if infix else ()
    return [*config_files(), *(f"{name}/{stem}{end}" for name, stem in sorted(parts) for end in (*endings, *older))]


def download(name: str, files: Files, *, variant: str | None = None, revision: str | None = None) -> Path:
    """Fetch those files that a repository has, unless the cache has them.

    Where the hub is chosen, how it is signed in to, and whether it may be asked at all (``HF_ENDPOINT``, ``HF_TOKEN``,
    ``HF_HUB_OFFLINE``) is the hub client's matter.

    Args:
        name: Name of the repository, such as ``org/model``.
        files: Gives the patterns of the files.
        variant: Variant of the weights, such as ``"fp16"``.
        revision: Branch, tag or commit; by default the main branch.

    Returns:
        The directory in the cache.

    Raises:
        SourceError: if the hub cannot be reached and the cache has nothing, there is no such repository, or the client
            is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise SourceError(
            f"{name!r} does not exist here, and to fetch a model of that name huggingface_hub is missing; "
            'pip install "latentrt[hub]"'
        ) from error
    utils: Any = huggingface_hub.utils  # these functions are documented, but not marked as exported
    quiet = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    if quiet:
        utils.disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files(variant)))
    except Exception as error:  # the client lets exceptions of its HTTP library through
        raise SourceError(f"{name!r} does not exist here, and {_reason(error, revision)}") from error
    finally:
        if quiet:
            utils.enable_progress_bars()


def _reason(error: Exception, revision: str | None) -> str:
    """Why a repository could not be fetched."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub gives it only to those who accepted its terms; do so there, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no model of that name, or keeps it private (then set HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the model of that name on the hub has no revision {revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "the hub cannot be reached, nor is a model of that name in its cache"
    return f"it could not be fetched from the hub: {first_line(error)}"
