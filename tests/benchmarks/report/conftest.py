"""What tests of benchmarks share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def reports() -> Any:
    """The module ``reports.py`` beside this one: reports of benchmarks that were never run."""
    spec = importlib.util.spec_from_file_location("reports", Path(__file__).with_name("reports.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
