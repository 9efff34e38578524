"""Small bundles for the tests of this folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def small() -> Any:
    """The module ``small_bundles.py``: this folder is no package."""
    spec = importlib.util.spec_from_file_location("small_bundles", Path(__file__).with_name("small_bundles.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def target(small: Any, tmp_path: Path) -> Path:
    """A bundle of the value 1, alone in its directory."""
    built: Path = small.build(tmp_path / "parent" / "emoji", 1)
    return built
