"""Directories that Optimum exported: a folder with a graph for each component, and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentrt.engines.errors import SourceError

from ..families import PIPELINES, Family
from .description import SCHEDULER, Description, TokenizerFolder, licence_of
from .links import check_links
from .weights import read_json

MODEL = "model.onnx"
"""Name of a graph in its folder."""

_VAE = "vae_decoder"


@dataclass(frozen=True)
class GraphFolders:
    """Graphs in place of weights.

    Attributes:
        path: The directory.
        components: Inputs and outputs that each component must have.
        tools: Libraries that made the graphs, with versions, as far as the configurations name them.
    """

    path: Path
    components: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
    tools: tuple[tuple[str, str], ...]

    def read(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Refuse: there are no weights.

        Raises:
            SourceError: always.
        """
        raise SourceError(
            f"{self.path.name} holds graphs that were exported elsewhere, and no weights of {name} to compare or export"
        )

    def files(self) -> list[Path]:
        """Every file that decides the bundle, except for tokenizers."""
        files = [self.path / SCHEDULER, *sorted(self.path.glob("*/config.json"))]
        for name in self.components:
            files += sorted(file for file in (self.path / name).iterdir() if file.is_file())
        return list(dict.fromkeys(files))


def has_graphs(path: Path) -> bool:
    """Whether a directory has a denoiser's graph and no weights of it; models on hubs may have both."""
    return any(
        (path / family.denoiser / MODEL).is_file() and not any((path / family.denoiser).glob("*.safetensors"))
        for family in PIPELINES.values()
    )


def describe(path: Path, name: str) -> tuple[Description, GraphFolders]:
    """Check a directory that Optimum exported, but for the graphs themselves.

    Args:
        path: The directory.
        name: Its name in messages.

    Raises:
        SourceError: naming the first thing that is missing, unknown or absurd.
    """
    check_links(path, ())
    index = read_json(path / "model_index.json", "the directory was not exported by Optimum")
    pipeline = str(index.get("_class_name")).removeprefix("ORT")
    family = PIPELINES.get(pipeline)
    if family is None or family.optimum is None:
        known = [each for each, other in PIPELINES.items() if other.optimum is not None]
        raise SourceError(f"{name} holds graphs of a {pipeline!r}; supported: {', '.join(known)}")
    components = {
        **{part: (("input_ids",), outputs) for part, outputs in family.optimum.items()},
        family.denoiser: (("sample", "timestep", "encoder_hidden_states", *family.vectors), ("out_sample",)),
        _VAE: (("latent_sample",), ("sample",)),
    }
    check_links(path, (*components, *family.tokenizers, "scheduler"))
    for component in components:
        if not (path / component / MODEL).is_file():
            raise SourceError(f"{component}/{MODEL} of {name} is missing")
    configs = {part: _config(path, part, family) for part in family.parts}
    scheduler = read_json(path / SCHEDULER, "the scheduler is missing")
    tokenizers = {each: TokenizerFolder(path / each) for each in family.tokenizers}
    described = Description.checked(index, family, configs, scheduler, tokenizers, licence_of(path))
    return described, GraphFolders(path, components, tuple(_tools(index, configs)))


def _config(path: Path, part: str, family: Family) -> dict[str, Any]:
    """Configuration of a part; that of the VAE is with each of its halves."""
    return read_json(path / (_VAE if part == "vae" else part) / "config.json", f"{part} is incomplete")


def _tools(index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    said = [("diffusers", index.get("_diffusers_version"))]
    said += [("transformers", config.get("transformers_version")) for config in configs.values()]
    return [(tool, version) for tool, version in said if isinstance(version, str)]
