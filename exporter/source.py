"""Reading a diffusers directory without trusting it.

Nothing in a source decides what code runs: class names are looked up in a table here, configuration files
contribute numbers and names of known layers alone, and weights come from safetensors. A source is read completely
and checked against its own configuration before anything is built from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.runtime.manifest import PREDICTION_TYPES
from latentrt.runtime.samplers import default_sampler

from .families import PIPELINES, Family
from .tokenizers import KINDS, read_tokenizer

_PICKLED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
_MAX_JSON = 16 * 2**20
_MAX_SAFETENSORS_HEADER = 100 * 2**20
_MAX_INTEGER = 10**6
_MAX_LIST = 64
_MAX_LAYERS = 256
_MAX_LAYERS_PER_BLOCK = 16
_MAX_NESTING = 16
_PROBE_STEPS = 10


@dataclass(frozen=True)
class Source:
    """A checked diffusers directory.

    Attributes:
        path: The directory.
        family: The family that it belongs to.
        index: ``model_index.json``.
        configs: ``config.json`` of each part with weights, by name.
        scheduler: ``scheduler_config.json``, without a bound that diffusers writes as ``-Infinity``.
        licence: What the model card says of the licence, or ``"unknown"``.
        fingerprint: SHA-256 over every file that decides the export.
    """

    path: Path
    family: Family
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    licence: str
    fingerprint: str

    @property
    def name(self) -> str:
        """The directory's own name."""
        return os.fsencode(self.path.resolve().name).decode(errors="replace") or "model"

    @classmethod
    def open(cls, path: Path) -> Source:
        """Check a diffusers directory.

        Raises:
            SourceError: if the directory, a configuration file or the weights are missing, damaged or of a kind
                that is not supported.
        """
        if not path.is_dir():
            hint = "is a file; a diffusers directory is expected" if path.exists() else "does not exist"
            raise SourceError(f"source {str(path)!r} {hint}")
        index = read_json(path / "model_index.json", "the directory is not a diffusers pipeline")
        pipeline = index.get("_class_name")
        if not isinstance(pipeline, str) or pipeline not in PIPELINES:
            raise SourceError(f"{path.name} is a {pipeline!r}; supported pipelines: {', '.join(PIPELINES)}")
        family = PIPELINES[pipeline].variant(index)
        classes = {name: part.classes for name, part in family.parts.items()}
        classes |= {name: tokenizer.classes for name, tokenizer in family.tokenizers.items()}
        for name, expected in classes.items():
            entry = index.get(name)
            found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
            if found not in expected:
                raise SourceError(f"{name} of {path.name} has the class {found!r}, expected {' or '.join(expected)}")
        configs = {name: read_json(path / name / "config.json", f"{name} is incomplete") for name in family.parts}
        for name, config in configs.items():
            _check_bounds(config, f"{name}/config.json")
        family.check(configs)
        scheduler = _scheduler(path, family)
        weights = [file for name, part in family.parts.items() for file in weight_files(path / name, part.stem)]
        for file in weights:
            with _opened(file):
                pass  # the lengths in its header fit the file
        files = [path / name / "config.json" for name in family.parts] + weights
        for name in family.tokenizers:
            files += [file for file in sorted((path / name).glob("*")) if file.is_file()]
        files += [path / "scheduler" / "scheduler_config.json"]
        return cls(path, family, index, configs, scheduler, _licence(path), _fingerprint(path, files))

    def load(self, name: str) -> nn.Module:
        """Build a part with weights, such as ``unet`` or ``vae``, in fp32 on the CPU, in evaluation mode.

        Raises:
            SourceError: if configuration and weights do not fit each other, or a weight is not finite.
        """
        part, config = self.family.parts[name], self.configs[name]
        tensors = read_weights(self.path / name, part.stem)
        try:
            with torch.device("meta"):  # whatever sizes it names, nothing is allocated before the weights fit
                module = part.build(config)
        except Exception as error:  # the libraries raise whatever their constructors run into
            raise SourceError(f"{name}/config.json does not describe a model: {_first_line(error)}") from error
        tensors = part.rename(tensors, module)
        _assign(module, tensors, name)
        if any(buffer.is_meta for buffer in module.buffers()):  # tables that are not stored, such as position ids
            module = part.build(config)
            _assign(module, tensors, name)
        return module.eval().requires_grad_(False)

    def load_tokenizer(self, name: str = "tokenizer") -> PreTrainedTokenizerBase:
        """Build a tokenizer from its vocabulary files.

        Raises:
            SourceError: if a file is missing or damaged, or the text encoder does not know all of its tokens.
        """
        part, label = self.family.tokenizers[name], f"the {name} of {self.path.name}"
        tokenizer = read_tokenizer(self.path / name, part.kind, label)
        highest = max(tokenizer.get_vocab().values())
        rows = int(self.configs[part.encoder].get("vocab_size", KINDS[part.kind].rows))
        if highest >= rows:
            raise SourceError(f"{label} has token ids up to {highest}, its text encoder only {rows} tokens")
        if tokenizer.pad_token_id is None:
            raise SourceError(f"{label} has no padding token")
        return tokenizer


def read_json(path: Path, meaning: str) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Args:
        path: The file.
        meaning: What it means that the file is missing, for the message.

    Raises:
        SourceError: if it is missing, too large, or no JSON object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path.parent.name}/{path.name} is no regular file; a configuration file is expected")
        if status.st_size > _MAX_JSON:
            raise SourceError(f"{path.name} has over {_MAX_JSON // 2**20} MiB; a configuration file is expected")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path.parent.name}/{path.name} is missing: {meaning}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise SourceError(f"{path.parent.name}/{path.name} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path.parent.name}/{path.name} holds a {type(content).__name__}, expected a JSON object")
    return content


def weight_files(directory: Path, stem: str) -> list[Path]:
    """The safetensors files of a component: one file, its fp16 variant, or the shards of an index.

    Raises:
        SourceError: if there are none; the message says so where there are pickled weights instead.
    """
    for variant in ("", ".fp16"):
        if (directory / f"{stem}{variant}.safetensors").is_file():
            return [directory / f"{stem}{variant}.safetensors"]
        index_path = directory / f"{stem}.safetensors.index{variant}.json"
        if index_path.is_file():
            return _shards(index_path)
    pickled = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
    if pickled:
        raise SourceError(
            f"{directory.name} has only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them to safetensors first"
        )
    raise SourceError(f"{directory.name}/{stem}.safetensors is missing")


def _shards(index_path: Path) -> list[Path]:
    directory = index_path.parent
    shards = read_json(index_path, "the index of the weights is missing").get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise SourceError(
            f"{directory.name}/{index_path.name} does not name the shards of the weights: "
            "plain names that end with .safetensors are expected"
        )
    if missing := [name for name in sorted(names) if not (directory / name).is_file()]:
        raise SourceError(f"{directory.name}/{missing[0]} is missing, but the index of the weights names it")
    return [directory / name for name in sorted(names)]


def read_weights(directory: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a component as fp32.

    Raises:
        SourceError: if a file is truncated or damaged, a tensor stands twice, or a value is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory, stem):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in tensors:
                    raise SourceError(f"{directory.name}: the tensor {name!r} stands in two files")
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point():
                    tensor = tensor.float()
                    if not bool(torch.isfinite(tensor).all()):
                        raise SourceError(f"{directory.name}: the tensor {name!r} holds NaN or infinity")
                tensors[name] = tensor
    return tensors


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file, and translate what goes wrong while it is open."""
    try:
        _check_header(file)
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SourceError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{file.parent.name}/{file.name} is damaged: {_first_line(error)}") from error


def _assign(module: nn.Module, tensors: dict[str, Tensor], component: str) -> None:
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        detail = lines[1] if len(lines) > 1 else lines[0]
        raise SourceError(f"weights of {component} do not fit its config.json: {detail[:200]}") from error


def _check_header(file: Path) -> None:
    """Refuse a header that claims more than the file holds before anything reads it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(size - 8, _MAX_SAFETENSORS_HEADER):
        raise SourceError(
            f"{file.parent.name}/{file.name} is damaged: its header claims {length:,} bytes of a file of {size:,}"
        )


def _check_bounds(value: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Refuse numbers that no model has, before a constructor loops over them."""
    if depth > _MAX_NESTING:
        raise SourceError(f"{where} is nested more than {_MAX_NESTING} levels deep, which no configuration is")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_bounds(item, where, str(name), depth + 1)
    elif isinstance(value, list):
        if len(value) > _MAX_LIST:
            raise SourceError(f"{where}: {key!r} has {len(value)} entries, at most {_MAX_LIST} are plausible")
        for item in value:
            _check_bounds(item, where, key, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = _MAX_LAYERS if "layers" in key else _MAX_INTEGER
        limit = _MAX_LAYERS_PER_BLOCK if "layers_per_block" in key else limit
        if not -limit <= value <= limit:  # also when it is NaN, or an integer beyond the floating-point numbers
            raise SourceError(f"{where}: {key!r} is {value}, which no model has (at most {limit})")


def _scheduler(path: Path, family: Family) -> dict[str, Any]:
    """Read the scheduler's configuration; refuse an unknown class, and values from which no sampler can be compiled."""
    config = read_json(path / "scheduler" / "scheduler_config.json", "the scheduler is missing")
    if config.get("lambda_min_clipped") == -math.inf:  # "no bound", which JSON proper cannot say
        del config["lambda_min_clipped"]
    prediction = config.get("prediction_type", family.prediction)
    if prediction not in PREDICTION_TYPES:
        raise SourceError(
            f"scheduler/scheduler_config.json: 'prediction_type' is {prediction!r}, "
            f"expected one of {', '.join(PREDICTION_TYPES)}"
        )
    try:
        json.dumps(config, allow_nan=False)
        family.compile_plan(config, default_sampler(config), _PROBE_STEPS)
    except (InvalidRequestError, ValueError, RecursionError) as error:  # the source's fault, not the caller's
        raise SourceError(f"scheduler/scheduler_config.json: {_first_line(error)}") from error
    return config


def _fingerprint(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _licence(path: Path) -> str:
    """The ``license:`` line of a model card's front matter."""
    card = path / "README.md"
    if card.is_file() and card.stat().st_size < _MAX_JSON:
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
            if line.startswith("license:"):
                return line.partition(":")[2].strip()[:200] or "unknown"
    return "unknown"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
