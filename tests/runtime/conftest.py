"""The model of plain functions, and pipelines on it and on real engines, for the tests of this layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines import FakeEngine
from latentrt.exporter.source.opening import open_source
from latentrt.runtime import Bundle, Pipeline


@pytest.fixture(scope="session")
def load_beside() -> Callable[[str, str], Any]:
    """A function that loads a module by the path of a file beside it and its name: folders of tests are no packages."""

    def load(beside: str, name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, Path(beside).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def plain_model(load_beside: Callable[[str, str], Any]) -> Any:
    """The module ``plain_model.py``."""
    return load_beside(__file__, "plain_model")


@pytest.fixture(scope="module")
def bundle(tiny_bundles: dict[str, Path]) -> Bundle:
    """The tiny SD 1.x bundle: latents of 4 channels at half the picture's size."""
    return Bundle.open(tiny_bundles["sd1"])


@pytest.fixture
def engines(plain_model: Any) -> dict[str, FakeEngine]:
    return plain_model.fakes()


@pytest.fixture
def pipe(bundle: Bundle, engines: dict[str, FakeEngine]) -> Pipeline:
    return Pipeline(bundle, engines)


@pytest.fixture(scope="module")
def real(tiny_bundles: dict[str, Path]) -> Iterator[Pipeline]:
    """A pipeline on ONNX Runtime."""
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def lora_pair(tiny: Any, lora_files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs for U-Net and text encoder, in different layouts."""
    source, folder = open_source(tiny.source("sd1")), tmp_path_factory.mktemp("loras")
    return (
        lora_files.write(lora_files.peft(source), folder / "a.safetensors"),
        lora_files.write(lora_files.kohya(source, seed=2), folder / "b.safetensors"),
    )


@pytest.fixture(scope="session")
def sd1(tiny: Any) -> Path:
    """The path of the tiny SD 1.x bundle, not to be changed."""
    return Path(tiny.bundle("sd1"))


@pytest.fixture
def fresh(sd1: Path) -> Iterator[Pipeline]:
    """A pipeline on ONNX Runtime that a test may change."""
    with Pipeline.load(sd1, "onnxruntime") as opened:
        yield opened
