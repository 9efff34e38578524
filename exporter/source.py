"""Reading a diffusers directory without trusting it.

Nothing in a source decides what code runs: class names are looked up in a table here, configuration files
contribute numbers and names of known layers alone, and weights come from safetensors. A source is read completely
and checked against its own configuration before anything is built from it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentrt.engines.errors import SourceError
from latentrt.runtime.samplers import default_sampler

PIPELINES = {"StableDiffusionPipeline": "stable-diffusion"}
"""Pipelines that can be exported, and the model family each belongs to."""
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
"""Components of a Stable Diffusion pipeline and the classes that each may have."""

_WEIGHTS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_PICKLED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
_MAX_JSON = 16 * 2**20
_MAX_SAFETENSORS_HEADER = 100 * 2**20
_MAX_INTEGER = 10**6
_MAX_LIST = 64
_MAX_LAYERS = 256


@dataclass(frozen=True)
class Source:
    """A checked diffusers directory.

    Attributes:
        path: The directory.
        family: Model family, a value of :data:`PIPELINES`.
        configs: ``config.json`` of each component with weights, by component name.
        scheduler: ``scheduler_config.json``.
        licence: What the model card says of the licence, or ``"unknown"``.
        fingerprint: SHA-256 over every file that decides the export.
    """

    path: Path
    family: str
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    licence: str
    fingerprint: str

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

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
        if pipeline not in PIPELINES:
            raise SourceError(f"{path.name} is a {pipeline!r}; supported pipelines: {', '.join(PIPELINES)}")
        for component, classes in COMPONENTS.items():
            entry = index.get(component)
            found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
            if found not in classes:
                raise SourceError(
                    f"{component} of {path.name} has the class {found!r}, expected {' or '.join(classes)}"
                )
        configs = {name: read_json(path / name / "config.json", f"{name} is incomplete") for name in _WEIGHTS}
        for name, config in configs.items():
            _check_bounds(config, f"{name}/config.json")
        scheduler = read_json(path / "scheduler" / "scheduler_config.json", "the scheduler is missing")
        default_sampler(scheduler)  # refuses a scheduler class that is not known
        files = [path / name / "config.json" for name in _WEIGHTS]
        files += [file for name in _WEIGHTS for file in weight_files(path / name, _WEIGHTS[name])]
        files += [file for file in sorted((path / "tokenizer").glob("*")) if file.is_file()]
        files += [path / "scheduler" / "scheduler_config.json"]
        return cls(path, PIPELINES[pipeline], configs, scheduler, _licence(path), _fingerprint(path, files))

    def load(self, component: str) -> nn.Module:
        """Build ``text_encoder``, ``unet`` or ``vae`` in fp32 on the CPU, in evaluation mode.

        Raises:
            SourceError: if configuration and weights do not fit each other, or a weight is not finite.
        """
        config = self.configs[component]
        tensors = read_weights(self.path / component, _WEIGHTS[component])
        try:
            if component == "text_encoder":
                module: nn.Module = CLIPTextModel(CLIPTextConfig(**_known(config, CLIPTextConfig)))
                tensors = _match_prefix(tensors, module)
            else:
                factory = UNet2DConditionModel if component == "unet" else AutoencoderKL
                with torch.device("meta"):  # no memory for weights that are about to be replaced
                    module = factory(**_known(config, factory))
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            raise SourceError(f"{component}/config.json does not describe a model: {_first_line(error)}") from error
        try:
            module.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            detail = lines[1] if len(lines) > 1 else lines[0]
            raise SourceError(f"weights of {component} do not fit its config.json: {detail[:200]}") from error
        return module.eval().requires_grad_(False)

    def load_tokenizer(self) -> CLIPTokenizer:
        """Build the tokenizer from its vocabulary files.

        Raises:
            SourceError: if a file is missing or damaged.
        """
        directory = self.path / "tokenizer"
        try:
            return CLIPTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise SourceError(f"the tokenizer of {self.path.name} cannot be read: {_first_line(error)}") from error


def read_json(path: Path, meaning: str) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Args:
        path: The file.
        meaning: What it means that the file is missing, for the message.

    Raises:
        SourceError: if it is missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
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
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (directory / name).is_file():
            return [directory / name]
    index_path = directory / f"{stem}.safetensors.index.json"
    if index_path.is_file():
        shards = read_json(index_path, "the index of the weights is missing").get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, dict) and shards else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise SourceError(f"{directory.name}/{index_path.name} does not name the shards of the weights")
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise SourceError(f"{directory.name}/{missing[0]} is missing, but the index of the weights names it")
        return [directory / name for name in names]
    pickled = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
    if pickled:
        raise SourceError(
            f"{directory.name} has only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them to safetensors first"
        )
    raise SourceError(f"{directory.name}/{stem}.safetensors is missing")


def read_weights(directory: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a component as fp32.

    Raises:
        SourceError: if a file is truncated or damaged, a tensor stands twice, or a value is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory, stem):
        _check_header(file)
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if name in tensors:
                        raise SourceError(f"{directory.name}: the tensor {name!r} stands in two files")
                    tensor = opened.get_tensor(name)
                    if tensor.is_floating_point():
                        tensor = tensor.float()
                        if not bool(torch.isfinite(tensor).all()):
                            raise SourceError(f"{directory.name}: the tensor {name!r} holds NaN or infinity")
                    tensors[name] = tensor
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"{directory.name}/{file.name} is damaged: {_first_line(error)}") from error
    return tensors


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


def _check_bounds(value: Any, where: str, key: str = "") -> None:
    """Refuse numbers that no model has, before a constructor loops over them."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_bounds(item, where, str(name))
    elif isinstance(value, list):
        if len(value) > _MAX_LIST:
            raise SourceError(f"{where}: {key!r} has {len(value)} entries, at most {_MAX_LIST} are plausible")
        for item in value:
            _check_bounds(item, where, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = _MAX_LAYERS if "layers" in key else _MAX_INTEGER
        if not math.isfinite(value) or abs(value) > limit:
            raise SourceError(f"{where}: {key!r} is {value}, which no model has (at most {limit})")


def _known(config: Mapping[str, Any], factory: Any) -> dict[str, Any]:
    """The entries of ``config`` that are constructor parameters, without private ones and library switches."""
    names = {name for name, p in inspect.signature(factory).parameters.items() if p.kind is not p.VAR_KEYWORD}
    names |= set(getattr(factory, "__annotations__", {}))
    switches = {"torch_dtype", "dtype", "attn_implementation", "quantization_config", "auto_map", "use_safetensors"}
    return {key: value for key, value in config.items() if key in names - switches and not key.startswith("_")}


def _match_prefix(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Give CLIP's tensors the names of the installed transformers, which has them with or without ``text_model.``."""
    expected = set(module.state_dict())
    nested = any(name.startswith("text_model.") for name in expected)
    renamed = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    renamed.pop("embeddings.position_ids", None)  # a constant that old checkpoints stored
    return {f"text_model.{name}" if nested else name: tensor for name, tensor in renamed.items()}


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
                return line.partition(":")[2].strip()
    return "unknown"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
