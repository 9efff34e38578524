"""Sources and bundles that several parts of the suite share; each is made once a run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the processor
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "examples" / "emoji"


def _module(name: str) -> Any:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_gpu() -> Any:
    """The module ``tests/fake_gpu.py``: a make-believe GPU."""
    return _module("fake_gpu")


@pytest.fixture(scope="session")
def emoji_source() -> Path:
    """The diffusers directory of the emoji model."""
    return EMOJI


@pytest.fixture(scope="session")
def tiny_models() -> Any:
    """The module ``tests/tiny_models.py``: random sources by kind."""
    return _module("tiny_models")


@pytest.fixture(scope="session")
def lora_files() -> Any:
    """The module ``tests/lora_files.py``: LoRAs in the layouts that there are."""
    return _module("lora_files")


@pytest.fixture(scope="session")
def original_layout() -> Any:
    """The module ``tests/original_layout.py``: checkpoints in a single file."""
    return _module("original_layout")


@pytest.fixture(scope="session")
def hub_server() -> Any:
    """The module ``tests/hub_server.py``: a hub of models on this machine."""
    return _module("hub_server")


@pytest.fixture(scope="session")
def optimum_layout() -> Any:
    """The module ``tests/optimum_layout.py``: directories of graphs as Optimum exports them."""
    return _module("optimum_layout")


class TinyModels:
    """Random tiny sources and their bundles for ONNX Runtime, each made when it is first asked for; not to be changed.

    Args:
        module: ``tests/tiny_models.py``.
        sources: Where to write sources.
        bundles: Where to write bundles.
    """

    def __init__(self, module: Any, sources: Path, bundles: Path) -> None:
        self._module, self._sources, self._bundles = module, sources, bundles
        self._built: set[str] = set()

    def source(self, kind: str) -> Path:
        """The source of a kind in ``WRITERS``."""
        path = self._sources / kind
        return path if path.exists() else Path(self._module.write(path, kind))

    def tiny_vae(self) -> Path:
        """An AutoencoderTiny for their latents."""
        path = self._sources / "taesd"
        return path if path.exists() else Path(self._module.tiny_vae(path))

    def bundle(self, kind: str) -> Path:
        """Its bundle."""
        if kind not in self._built:
            tiny_vae = self.tiny_vae() if kind in self._module.WITH_TINY_VAE else None
            lender, parts = self._module.LENDERS.get(kind, (None, ()))
            with _borrowing(self.bundle(lender), parts) if lender else contextlib.nullcontext():
                _build(self.source(kind), self._bundles / kind, tiny_vae)
            self._built.add(kind)
        return self._bundles / kind


@pytest.fixture(scope="session")
def tiny(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory, bundle_cache: Path) -> TinyModels:
    """Random tiny sources and bundles of every family."""
    return TinyModels(tiny_models, tmp_path_factory.mktemp("sources"), bundle_cache)


@pytest.fixture(scope="session")
def tiny_sources(tiny: TinyModels) -> dict[str, Path]:
    """Random tiny sources ``sd1`` and ``sd2``; never to be changed, :func:`tiny_source` gives a copy."""
    return {kind: tiny.source(kind) for kind in ("sd1", "sd2")}


@pytest.fixture
def tiny_source(tiny_sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny SD 1.x source that a test may damage."""
    return Path(shutil.copytree(tiny_sources["sd1"], tmp_path / "source"))


@pytest.fixture(scope="session")
def bundle_cache(pytestconfig: pytest.Config) -> Path:
    """A directory that outlives the run, one for each state of the exporter's code.

    Exporting takes most of a test run's time, and the exporter itself finds out whether a bundle still fits its
    source. ``pytest --cache-clear`` starts afresh.
    """
    digest = hashlib.sha256()
    for file in sorted((ROOT / "exporter").rglob("*.py")):
        digest.update(file.read_bytes())
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("bundles") / digest.hexdigest()[:16]


@contextlib.contextmanager
def _borrowing(lender: Path, parts: Collection[str]) -> Iterator[None]:
    """Copy the graphs of some components instead of exporting them; the build still compares them with torch."""
    from latentrt.exporter import construction
    from latentrt.runtime import Bundle

    bundle, export = Bundle.open(lender), construction.export_component

    def borrow(component: Any, form: Any, directory: Path) -> Any:
        if component.name not in parts:
            return export(component, form, directory)
        graph = bundle.graph(component.name, form.name)
        for file in (graph.file, *graph.external):
            (directory / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(bundle.file(file), directory / file)
        return graph

    with mock.patch.object(construction, "export_component", borrow):
        yield


def _build(source: Path, output: Path, tiny_vae: Path | None = None) -> Path:
    from latentrt.exporter.build import BuildRequest, build_bundle

    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_name(f"{output.name}.lock")):  # another worker may need it as well
        build_bundle(BuildRequest(source, output, tiny_vae=tiny_vae))
    return output


@pytest.fixture(scope="session")
def tiny_bundles(tiny: TinyModels) -> dict[str, Path]:
    """Bundles of the tiny sources for ONNX Runtime; never to be changed, :func:`tiny_bundle` gives a copy."""
    return {kind: tiny.bundle(kind) for kind in ("sd1", "sd2")}


@pytest.fixture
def tiny_bundle(tiny_bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny SD 1.x bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundles["sd1"], tmp_path / "bundle"))


@pytest.fixture(scope="session")
def emoji_bundle(emoji_source: Path, bundle_cache: Path) -> Path:
    """The emoji model's bundle for ONNX Runtime; never to be changed."""
    return _build(emoji_source, bundle_cache / "emoji")
