"""Opening a source: a diffusers directory, a single file, a model on a hub, or graphs that Optimum exported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentrt.engines.errors import InvalidRequestError, SourceError

from ..families import Family
from . import hub, single_file
from .description import SCHEDULER, Description, TokenizerFolder, family_of
from .optimum import describe, has_graphs
from .source import Source, Weights
from .weights import PICKLED, opened, read_weights, weight_files


@dataclass(frozen=True)
class Reading:
    """Settings that a source does not have itself, and which of its files to read.

    Attributes:
        config: For a single file: a diffusers directory, or the name of one on a hub, whose configurations, scheduler
            and tokenizers the weights go with; none of its weights are read.
        tokenizer: For a single file without ``config``: a folder of CLIP's tokenizer, or the name of one on a hub.
        prediction: For a single file: the denoiser's prediction, ``"epsilon"`` or ``"v_prediction"``.
        variant: For a directory or a hub: the variant of the files of weights, such as ``"fp16"``.
        revision: For a hub: branch, tag or commit.
    """

    config: Path | None = None
    tokenizer: Path | None = None
    prediction: str | None = None
    variant: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.prediction not in (None, *single_file.PREDICTIONS):
            known = ", ".join(single_file.PREDICTIONS)
            raise InvalidRequestError(f"prediction is {self.prediction!r}, expected one of {known}")
        if self.variant is not None and not self.variant.replace("_", "").isalnum():
            raise InvalidRequestError(f"variant is {self.variant!r}, expected a word such as fp16")
        if self.config is not None and self.tokenizer is not None:
            raise InvalidRequestError("a config has tokenizers; give it or a tokenizer, not both")

    def refuse(self, kind: str, *names: str) -> None:
        """Refuse settings that do not concern a kind of source.

        Args:
            kind: The kind with its article, for the message.
            names: Attributes that must be ``None``.

        Raises:
            InvalidRequestError: if one of ``names`` is given.
        """
        for name in names:
            if getattr(self, name) is not None:
                raise InvalidRequestError(f"the source is {kind}, which has no use for a {name}; leave it out")


def open_source(path: Path, reading: Reading | None = None) -> Source:
    """Check a model.

    Args:
        path: A diffusers directory, a checkpoint in a single safetensors file, or the name of a model on a hub.
        reading: Settings that it does not have itself; ``None`` stands for none.

    Raises:
        SourceError: if the source, a configuration file or the weights are missing, damaged or of a kind that is
            not supported.
        InvalidRequestError: if ``reading`` does not suit the kind of source.
    """
    reading = reading or Reading()
    if path.is_dir():
        reading.refuse("a directory", "config", "tokenizer", "prediction", "revision")
        name = os.fsencode(path.resolve().name).decode(errors="replace") or "model"
        if has_graphs(path):
            reading.refuse("a directory of graphs", "variant")
            return _open_graphs(path, name)
        return _open_directory(path, name, reading.variant)
    if path.is_file():
        reading.refuse("a single file", "variant", "revision")
        return _open_file(path, reading)
    if repository := hub.repository(path):
        reading.refuse("a model on a hub", "config", "tokenizer", "prediction")
        directory = hub.download(repository, hub.model_files, variant=reading.variant, revision=reading.revision)
        return _open_directory(directory, repository, reading.variant)
    fault = "is no regular file" if path.exists() else "does not exist"
    raise SourceError(
        f"source {str(path)!r} {fault}; expected a diffusers directory, a .safetensors file, or a model on a hub"
    )


@dataclass(frozen=True)
class _Folders:
    """Weights of a diffusers directory."""

    path: Path
    family: Family
    variant: str | None

    def read(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return read_weights(self.path / name, self.family.parts[name].stem, self.variant, dtype)

    def files(self) -> list[Path]:
        parts = self.family.parts.items()
        return [file for name, part in parts for file in weight_files(self.path / name, part.stem, self.variant)]


def _open_directory(path: Path, name: str, variant: str | None) -> Source:
    described = Description.read(path, name)
    weights = _Folders(path, described.family, variant)
    files = weights.files()
    for file in files:
        with opened(file):
            pass  # the lengths in its header fit the file
    files = [path / part / "config.json" for part in described.family.parts] + files
    for folder in described.tokenizers.values():
        files += folder.files()
    files += [path / SCHEDULER]
    fingerprint = _fingerprint({file.relative_to(path).as_posix(): file for file in files})
    return _source(name, described, fingerprint, weights)


def _open_graphs(path: Path, name: str) -> Source:
    described, folders = describe(path, name)
    files = folders.files()
    for folder in described.tokenizers.values():
        files += folder.files()
    return _source(name, described, _fingerprint({file.relative_to(path).as_posix(): file for file in files}), folders)


def _source(
    name: str, described: Description, fingerprint: str, weights: Weights, notes: tuple[str, ...] = ()
) -> Source:
    return Source(
        name=name,
        family=described.family,
        index=described.index,
        configs=described.configs,
        scheduler=described.scheduler,
        licence=described.licence,
        fingerprint=fingerprint,
        weights=weights,
        tokenizers=described.tokenizers,
        notes=notes,
    )


def _open_file(path: Path, reading: Reading) -> Source:
    """Check a single-file checkpoint."""
    if path.suffix.lower() in PICKLED:
        raise SourceError(
            f"{path.name} is a pickled checkpoint, which can run code when loaded; convert it to safetensors first"
        )
    if path.suffix.lower() != ".safetensors":
        raise SourceError(f"source {str(path)!r} is a file; a .safetensors file or a diffusers directory is expected")
    header = single_file.Header.read(path)
    notes: tuple[str, ...] = ()
    if reading.config is not None:
        directory = _directory(reading.config, hub.config_files, "config")
        described = Description.read(directory, directory.name)
        scheduler = dict(described.scheduler)
        if reading.prediction is not None:
            scheduler["prediction_type"] = reading.prediction
        described = dataclasses.replace(described, scheduler=scheduler)
        hint = f"; is {directory.name} the configuration of this model?"
    else:
        published, notes = single_file.recognise(header, reading.prediction)
        if reading.tokenizer is None:
            raise SourceError(
                f"{path.name} holds no tokenizer; give --tokenizer DIR with CLIP's (such as tokenizer/ of a diffusers "
                "directory), or --config DIR with a diffusers directory of this model, where weights may be missing"
            )
        folder = _directory(reading.tokenizer, hub.tokenizer_files, "tokenizer")
        tokenizers = {name: TokenizerFolder(folder, padding) for name, padding in published.padding.items()}
        described = Description.checked(
            published.index,
            family_of(published.index, path.name),
            published.configs,
            published.scheduler,
            tokenizers,
            header.licence,
        )
        hint = "; for a model of other sizes give --config DIR, a diffusers directory with its configuration"
    checkpoint = single_file.SingleFileWeights(header, described.family, described.configs, hint)
    contents: dict[str, Path | bytes] = {
        "configs": json.dumps([described.configs, described.scheduler, described.index], sort_keys=True).encode(),
        "padding": json.dumps({name: folder.padding for name, folder in described.tokenizers.items()}).encode(),
    }
    for part, tokenizer in described.tokenizers.items():
        contents |= {f"{part}/{file.name}": file for file in tokenizer.files()}
    contents["weights"] = path
    name = os.fsencode(path.stem).decode(errors="replace") or "model"
    return _source(name, described, _fingerprint(contents), checkpoint, notes)


def _directory(path: Path, files: hub.Files, title: str) -> Path:
    """A directory here, or one that a hub has."""
    if path.is_dir():
        return path
    if not path.exists() and (repository := hub.repository(path)):
        return hub.download(repository, files)
    raise SourceError(f"the {title} {str(path)!r} {'is no directory' if path.exists() else 'does not exist'}")


def _fingerprint(contents: Mapping[str, Path | bytes]) -> str:
    """SHA-256 over names and contents, in their order."""
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        if isinstance(content, bytes):
            digest.update(hashlib.sha256(content).digest())
        else:
            with content.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
