"""Reading a model without trusting it: a diffusers directory, a single-file checkpoint, or what a hub has of either.

Nothing in a source decides what code runs: class names are looked up in a table here, configuration files
contribute numbers and names of known layers alone, and weights come from safetensors. A source is read completely
and checked against its own configuration before anything is built from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.runtime.manifest import IMAGE_ENCODER, SAFETY_CHECKER, STAGES, TINY_DECODER, controlled

from . import hub, single_file
from .description import SCHEDULER, Description, TokenizerFolder, family_of
from .families import Family
from .graph_folders import describe, has_graphs
from .tokenizers import KINDS, read_tokenizer
from .weights import PICKLED, assign, empty_module, opened, read_weights, weight_files

if TYPE_CHECKING:
    from .controlnet import ControlNet
    from .ip_adapter import IpAdapter
    from .lora import Lora
    from .safety_checker import SafetyChecker
    from .tiny_vae import TinyVae


@dataclass(frozen=True)
class Reading:
    """What a source does not say itself.

    Attributes:
        config: For a single file: a diffusers directory, or the name of one on a hub, whose configurations, scheduler
            and tokenizers the weights go with; none of its weights are read.
        tokenizer: For a single file without ``config``: a folder of CLIP's tokenizer, or the name of one on a hub.
        prediction: For a single file: what the denoiser predicts, ``"epsilon"`` or ``"v_prediction"``.
        variant: For a directory or a hub: which files of weights, such as ``"fp16"``.
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
        """Refuse what does not concern a kind of source.

        Raises:
            InvalidRequestError: if one of ``names`` is given.
        """
        for name in names:
            if getattr(self, name) is not None:
                raise InvalidRequestError(f"the source is {kind}, which has no use for a {name}; leave it out")


class Weights(Protocol):
    """Where weights come from."""

    def read(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of a part with the names that its class has for them, see :func:`.weights.read_tensors`.

        Raises:
            SourceError: if they are missing, damaged or not finite.
        """


@dataclass(frozen=True)
class Source:
    """A checked model.

    Attributes:
        name: What it is called: its directory, its file without the ending, or its name on a hub.
        family: The family that it belongs to.
        index: ``model_index.json``.
        configs: ``config.json`` of each part with weights, by name.
        scheduler: ``scheduler_config.json``, without a bound that diffusers writes as ``-Infinity``.
        licence: What the model card says of the licence, or ``"unknown"``.
        fingerprint: SHA-256 over all that decides the export.
        weights: Where its weights come from.
        tokenizers: Where its tokenizers are.
        notes: What was assumed, a sentence each.
        loras: Fused into the weights of the parts, see :mod:`latentrt.exporter.lora`.
        tiny_vae: A decoder beside the model's own.
        controlnets: Beside its denoiser.
        ip_adapter: In its denoiser.
        safety_checker: Looks at pictures.
        dtype: What weights are loaded as.
    """

    name: str
    family: Family
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    licence: str
    fingerprint: str
    weights: Weights
    tokenizers: Mapping[str, TokenizerFolder]
    notes: tuple[str, ...] = ()
    loras: tuple[Lora, ...] = ()
    tiny_vae: TinyVae | None = None
    controlnets: tuple[ControlNet, ...] = ()
    ip_adapter: IpAdapter | None = None
    safety_checker: SafetyChecker | None = None
    dtype: torch.dtype = torch.float32

    @property
    def components(self) -> tuple[str, ...]:
        """Components that are exported, in the order in which a bundle has them."""
        beside = [name for net in self.controlnets for name in net.components]
        tiny = [] if self.tiny_vae is None else [TINY_DECODER]
        image_encoder = [] if self.ip_adapter is None else [IMAGE_ENCODER]
        checker = [] if self.safety_checker is None else [SAFETY_CHECKER]
        return (*self.family.components, *tiny, *image_encoder, *beside, *checker)

    @property
    def all_components(self) -> tuple[str, ...]:
        """Every component of a bundle, the denoiser's stages too."""
        return tuple(part for name in self.components for part in self.with_stages(name))

    def with_stages(self, name: str) -> tuple[str, ...]:
        """A component, and its stages if it is the denoiser or a ControlNet; with those, the denoiser has a twin."""
        if any(name == net.body for net in self.controlnets):
            return (name, *(f"{name}_{stage}" for stage in STAGES))
        twin = controlled(name)
        has_twin = self.controlnets and name == self.family.denoiser
        return (*self.family.with_stages(name), *((twin, f"{twin}_{STAGES[-1]}") if has_twin else ()))

    @classmethod
    def open(cls, path: Path, reading: Reading | None = None) -> Source:
        """Check a model.

        Args:
            path: A diffusers directory, a checkpoint in a single safetensors file, or the name of a model on a hub.
            reading: What it does not say itself.

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
        raise SourceError(f"source {str(path)!r} {'is no regular file' if path.exists() else 'does not exist'}")

    def load(self, name: str) -> nn.Module:
        """Build a part with weights, such as ``unet`` or ``vae``, on the CPU, in evaluation mode.

        It is fp32 in spite of :attr:`dtype` if a weight leaves the range of that, or LoRAs are to be added.

        Raises:
            SourceError: if configuration and weights do not fit each other, or a weight is not finite.
        """
        part, config = self.family.parts[name], self.configs[name]
        dtype = torch.float32 if self.loras else self.dtype
        tensors = self.weights.read(name, dtype)
        if any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors.values()):
            tensors = self.weights.read(name, torch.float32)
        module = empty_module(part.build, config, name)
        tensors = part.rename(tensors, module)
        assign(module, tensors, name)
        if any(buffer.is_meta for buffer in module.buffers()):  # tables that are not stored, such as position ids
            module = part.build(config)
            assign(module, tensors, name)
        for lora in self.loras:
            lora.fuse(name, module)
        return module.eval().requires_grad_(False)

    def load_tokenizer(self, name: str = "tokenizer") -> PreTrainedTokenizerBase:
        """Build a tokenizer from its vocabulary files.

        Raises:
            SourceError: if a file is missing or damaged, or the text encoder does not know all of its tokens.
        """
        folder, label = self.tokenizers[name], f"the {name} of {self.name}"
        part = self.family.tokenizers[name]
        tokenizer = read_tokenizer(folder.path, part.kind, label, folder.padding)
        highest = max(tokenizer.get_vocab().values())
        rows = int(self.configs[part.encoder].get("vocab_size", KINDS[part.kind].rows))
        if highest >= rows:
            raise SourceError(f"{label} has token ids up to {highest}, its text encoder only {rows} tokens")
        if tokenizer.pad_token_id is None:
            raise SourceError(f"{label} has no padding token")
        return tokenizer


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
    checkpoint = single_file.Checkpoint(header, described.family, described.configs, hint)
    contents: dict[str, Path | bytes] = {
        "configs": json.dumps([described.configs, described.scheduler, described.index], sort_keys=True).encode(),
        "padding": json.dumps({name: folder.padding for name, folder in described.tokenizers.items()}).encode(),
    }
    for part, tokenizer in described.tokenizers.items():
        contents |= {f"{part}/{file.name}": file for file in tokenizer.files()}
    contents["weights"] = path
    name = os.fsencode(path.stem).decode(errors="replace") or "model"
    return _source(name, described, _fingerprint(contents), checkpoint, notes)


def _directory(path: Path, files: hub.Files, what: str) -> Path:
    """A directory here, or one that a hub has."""
    if path.is_dir():
        return path
    if not path.exists() and (repository := hub.repository(path)):
        return hub.download(repository, files)
    raise SourceError(f"the {what} {str(path)!r} {'is no directory' if path.exists() else 'does not exist'}")


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
