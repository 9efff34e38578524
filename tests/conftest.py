"""Sources and bundles that several parts of the suite share; each is made once a run."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the processor
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "examples" / "emoji"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most heavy tests come first, so that no worker is left alone with one at the end."""
    heavy = Counter(item.path for item in items if item.get_closest_marker("heavy"))
    items.sort(key=lambda item: -heavy[item.path])


def pytest_collection_finish() -> None:
    """What test modules imported is left out of garbage collections, of which each would take most of a second."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def doc_table() -> Any:
    """The module ``tests/doc_table.py``: tables of the manual that tests write."""
    return _module("doc_table")


class TinyModels:
    """Random tiny sources and their bundles for ONNX Runtime, each made when it is first asked for; not to be changed.

    Args:
        module: ``tests/tiny_models.py``.
        sources: Where to write sources.
        bundles: Where to write bundles.
        exports: Graphs that several of them have in common.
    """

    def __init__(self, module: Any, sources: Path, bundles: Path, exports: Any) -> None:
        self._module, self._sources, self._bundles, self._exports = module, sources, bundles, exports
        self._built: set[str] = set()

    def source(self, kind: str) -> Path:
        """The source of a kind in ``WRITERS``."""
        path = self._sources / kind
        return path if path.exists() else Path(self._module.write(path, kind))

    def tiny_vae(self) -> Path:
        """An AutoencoderTiny for their latents."""
        path = self._sources / "taesd"
        return path if path.exists() else Path(self._module.tiny_vae(path))

    def safety_checker(self) -> Path:
        """A StableDiffusionSafetyChecker, which goes with any."""
        path = self._sources / "safety_checker"
        return path if path.exists() else Path(self._module.safety_checker(path))

    def controlnet(self, kind: str, order: str = "rgb") -> Path:
        """A ControlNet for a kind, which takes colours in that order; its weights are the same for any."""
        path = self._sources / f"{kind}-{order}"
        return path if path.exists() else Path(self._module.controlnet(path, self.source(kind), order=order))

    def ip_adapter(self, kind: str) -> Path:
        """A folder with ``ip-adapter.safetensors`` for a kind, and its ``image_encoder``."""
        path = self._sources / f"{kind}-ip-adapter"
        return path if path.exists() else Path(self._module.ip_adapter(path, self.source(kind)))

    def controlled(self, kind: str) -> Path:
        """Its bundle with an IP-Adapter and two ControlNets, ``edges`` and ``depth``."""
        path = self._bundles / f"{kind}-controlled"
        if str(path) not in self._built:
            nets = {"edges": self.controlnet(kind), "depth": self.controlnet(kind, "bgr")}
            _build(self._exports, self.source(kind), path, controlnets=nets, ip_adapter=self.ip_adapter(kind))
            self._built.add(str(path))
        return path

    def bundle(self, kind: str) -> Path:
        """Its bundle."""
        if kind not in self._built:
            tiny_vae = self.tiny_vae() if kind in self._module.WITH_TINY_VAE else None
            checker = self.safety_checker() if kind in self._module.WITH_SAFETY_CHECKER else None
            _build(self._exports, self.source(kind), self._bundles / kind, tiny_vae, safety_checker=checker)
            self._built.add(kind)
        return self._bundles / kind


@pytest.fixture(scope="session")
def tiny(
    tiny_models: Any, tmp_path_factory: pytest.TempPathFactory, bundle_cache: Path, shared_exports: Any
) -> TinyModels:
    """Random tiny sources and bundles of every family."""
    return TinyModels(tiny_models, tmp_path_factory.mktemp("sources"), bundle_cache, shared_exports)


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


@pytest.fixture(scope="session")
def shared_exports(bundle_cache: Path) -> Any:
    """Exports that several bundles have in common, see ``tests/shared_exports.py``."""
    return _module("shared_exports").SharedExports(bundle_cache / "exports")


def _build(
    exports: Any,
    source: Path,
    output: Path,
    tiny_vae: Path | None = None,
    controlnets: Mapping[str, Path] | None = None,
    ip_adapter: Path | None = None,
    safety_checker: Path | None = None,
) -> Path:
    from latentrt.exporter.adapters.controlnet import ControlNetFile
    from latentrt.exporter.adapters.ip_adapter import IpAdapterFiles
    from latentrt.exporter.builder.build import build_bundle
    from latentrt.exporter.builder.request import BuildRequest

    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_name(f"{output.name}.lock")):  # another worker may need it as well
        nets = [ControlNetFile(name, path) for name, path in (controlnets or {}).items()]
        adapter = ip_adapter and IpAdapterFiles(ip_adapter / "ip-adapter.safetensors", ip_adapter / "image_encoder")
        extras = {"tiny_vae": tiny_vae, "controlnets": nets, "ip_adapter": adapter, "safety_checker": safety_checker}
        with exports.used():
            build_bundle(BuildRequest(source, output, **extras))
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
def emoji_bundle(emoji_source: Path, bundle_cache: Path, shared_exports: Any) -> Path:
    """The emoji model's bundle for ONNX Runtime; never to be changed."""
    return _build(shared_exports, emoji_source, bundle_cache / "emoji")
