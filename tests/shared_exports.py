"""Graphs of components that several bundles of the suite have in common: each is exported once, and then copied.

Exporting takes most of a build's time. What builds a bundle still compares every graph with torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from filelock import FileLock
from torch import nn

from latentrt.exporter.builder import construction
from latentrt.exporter.builder.manifest import tool_versions
from latentrt.exporter.components import Component
from latentrt.exporter.graphs.export import export_component
from latentrt.exporter.graphs.layers import adaptable
from latentrt.exporter.graphs.targets import Form
from latentrt.runtime.bundle.manifest import Graph


def export_key(component: Component, form: Form) -> str:
    """A hash of all that decides an export: form, inputs and outputs, structure, settings and weights."""
    digest = hashlib.sha256()

    def tell(*things: object) -> None:
        digest.update(repr(things).encode() + b"\0")

    tell(tool_versions(), form, component.outputs, sorted(component.keep_fp32), adaptable(component))
    tell([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in component.example.items()])
    tell([(name, sorted(axes.items())) for name, axes in component.dynamic.items()])
    for name, module in component.module.named_modules():
        tell(name, _kind(module), sorted(_settings(module)))
    module = component.module
    for name, tensor in itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        tell(name, tensor.dtype, tuple(tensor.shape))
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _settings(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Attributes of a module, and its configuration without the place it was read from."""
    for name, value in vars(module).items():
        if name == "config" or name.startswith("_"):
            continue
        yield name, _told(value)
    config: Any = getattr(module, "config", None)
    if config is not None:
        entries: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        yield from ((f"config.{name}", repr(value)) for name, value in entries.items() if not name.startswith("_"))


def _told(value: object) -> str:
    """An attribute, by its content where that is numbers or text."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, tuple | list):
        return repr([_told(each) for each in value])
    plain = value is None or isinstance(value, bool | int | float | str | torch.dtype)
    return repr(value) if plain else str(getattr(value, "__qualname__", _kind(value)))


class SharedExports:
    """Exports, by their keys; other workers of a run use the same.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, component: Component, form: Form) -> str:
        """What tells an export from others, see :func:`export_key`."""
        return export_key(component, form)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Builds export through this."""
        with mock.patch.object(construction, "export_component", self.export):
            yield

    def export(self, component: Component, form: Form, directory: Path) -> Graph:
        """What :func:`latentrt.exporter.graphs.export.export_component` does, or a copy of what it did."""
        kept = self.folder / export_key(component, form)[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):  # another worker may need it as well
            if not kept.exists():
                fresh = kept.with_suffix(".fresh")
                shutil.rmtree(fresh, ignore_errors=True)  # of a run that was stopped
                graph = export_component(component, form, fresh)
                (fresh / component.name).rename(fresh / "graph")
                (fresh / "entry").write_bytes(pickle.dumps(_renamed(graph, component.name, "graph")))
                fresh.rename(kept)
        graph = pickle.loads((kept / "entry").read_bytes())
        shutil.copytree(kept / "graph", directory / component.name, dirs_exist_ok=True)
        return _renamed(graph, "graph", component.name)


def _renamed(graph: Graph, old: str, new: str) -> Graph:
    """A graph in another component's folder."""
    file, *external = (f"{new}{each.removeprefix(old)}" for each in (graph.file, *graph.external))
    return dataclasses.replace(graph, file=file, external=tuple(external))
