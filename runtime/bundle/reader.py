"""Bundles on disk, opened with a look at every file.

A bundle is a directory with a ``bundle.json`` (see :mod:`latentrt.runtime.bundle.manifest`) that lists all its files.
Files that it does not list are tolerated and never read: people leave notes, and compiled engines come and go under
``engines/``. A graph that names such a file is refused. :mod:`latentrt.runtime.bundle.writer` writes bundles.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from latentrt.engines.errors import BundleError, BundleIntegrityError

from .manifest import ENGINES_DIRECTORY, MANIFEST_FILE, MAX_JSON_BYTES, Graph, Manifest
from .manifest_reading import read_manifest
from .onnx_guard import check_graph
from .onnx_reader import ExternalTensor
from .paths import plain_file


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Cheap to keep, safe to share between threads.

    Attributes:
        path: Its directory, absolute, without links.
        manifest: Content of its ``bundle.json``.
    """

    path: Path
    manifest: Manifest
    _guarded: dict[str, tuple[ExternalTensor, ...]] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify_hash: bool = False) -> Bundle:
        """Read the manifest and look at every file that it lists.

        Args:
            path: Directory of the bundle; it may be a symbolic link, its files may not.
            verify_hash: Read every file and compare its SHA-256, not only kind and size.

        Raises:
            BundleVersionError: if the bundle was written in another format.
            BundleIntegrityError: if a file is missing, of another size or content, or a link.
            BundleError: if there is no bundle, or its manifest is wrong.
        """
        given = Path(path)
        try:
            directory = given.resolve(strict=True)
            content = _read_manifest(directory, str(given))
        except BundleError:
            raise
        except FileNotFoundError as error:
            raise BundleError(f"{given} does not exist; make a bundle with latentrt build-engine") from error
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a path that cannot be one
            raise BundleError(f"{str(given)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        origin = str(given / MANIFEST_FILE)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{origin} is not UTF-8 text: {error.reason}") from error
        bundle = cls(directory, read_manifest(text, origin))
        for relative in bundle.manifest.files:
            bundle.file(relative)
        if verify_hash:
            bundle.verify_hash()
        return bundle

    @property
    def engines_directory(self) -> Path:
        """Where compiled engines live; it need not exist."""
        return self.path / ENGINES_DIRECTORY

    def graph(self, component: str, form: str) -> Graph:
        """A graph's entry in the manifest.

        Raises:
            BundleError: naming those that the bundle has instead.
        """
        parts = self.manifest.components
        if component not in parts:
            raise BundleError(f"{self.path} has no component {component!r}; it has {_names(parts)}")
        graphs = parts[component].graphs
        if form not in graphs:
            raise BundleError(f"{self.path}: {component} has no form {form!r}; it has {_names(graphs)}")
        return graphs[form]

    def file(self, relative: str) -> Path:
        """Path of a file that the manifest lists, after a look at the file itself.

        Raises:
            BundleError: if the manifest does not list it.
            BundleIntegrityError: if it is missing, not a regular file of its own, or of another size.
        """
        entry = self.manifest.files.get(relative)
        if entry is None:
            raise BundleError(f"the manifest of {self.path} does not list the file {relative!r}")
        size = plain_file(self.path, relative).st_size
        if size != entry.size:
            raise BundleIntegrityError(
                f"{self.path / relative} has {size} bytes, but the manifest says {entry.size}; "
                "the bundle is damaged, copy or build it again"
            )
        return self.path / relative

    def graph_path(self, component: str, form: str) -> Path:
        """Path of an ONNX graph that may be handed to an SDK: all files that it names are the bundle's own.

        The graph is read once a bundle; :mod:`latentrt.runtime.bundle.onnx_guard` lists the checks, and their limits.

        Raises:
            BundleError: if the bundle has no such graph.
            BundleIntegrityError: if the graph names anything else, or is damaged.
        """
        graph = self.graph(component, form)
        self.external_tensors(graph)
        return self.path / graph.file

    def external_tensors(self, graph: Graph) -> tuple[ExternalTensor, ...]:
        """Places of the weights of a graph that it does not hold itself.

        Raises:
            BundleIntegrityError: if the graph names anything but the bundle's own files, or is damaged.
        """
        with self._lock:
            if graph.file not in self._guarded:
                for relative in (graph.file, *graph.external):
                    self.file(relative)
                self._guarded[graph.file] = check_graph(self.path, graph)
            return self._guarded[graph.file]

    def verify_hash(self) -> None:
        """Read every listed file, in order of names, and compare its SHA-256.

        Raises:
            BundleIntegrityError: naming the first file that differs.
        """
        for relative in sorted(self.manifest.files):
            path = self.file(relative)
            try:
                digest = sha256_of(path)
            except OSError as error:
                raise BundleIntegrityError(f"{path} cannot be read: {error.strerror or error}") from error
            if digest != self.manifest.files[relative].sha256:
                raise BundleIntegrityError(
                    f"{path} has the SHA-256 {digest}, but the manifest says {self.manifest.files[relative].sha256}; "
                    "the bundle is damaged, copy or build it again"
                )


def _names(entries: Mapping[str, object]) -> str:
    return ", ".join(sorted(entries)) or "none"


def _read_manifest(directory: Path, label: str) -> bytes:
    """Content of a bundle's manifest, at most one byte more than is ever taken."""
    if not directory.is_dir():
        raise BundleError(f"{label} is a file, expected the directory of a bundle")
    if not os.path.lexists(directory / MANIFEST_FILE):
        raise BundleError(f"{label} is not a bundle: it has no {MANIFEST_FILE}; make one with latentrt build-engine")
    plain_file(directory, MANIFEST_FILE)
    with (directory / MANIFEST_FILE).open("rb") as file:
        return file.read(MAX_JSON_BYTES + 1)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
