"""Small bundles for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def small(load_beside: Callable[[str, str], Any]) -> Any:
    """The module ``small_bundles.py``."""
    return load_beside(__file__, "small_bundles")


@pytest.fixture
def target(small: Any, tmp_path: Path) -> Path:
    """A bundle of the value 1, alone in its directory."""
    built: Path = small.build(tmp_path / "parent" / "emoji", 1)
    return built
