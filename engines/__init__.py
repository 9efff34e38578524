"""Inference SDKs behind one small protocol. Nothing here imports an SDK before an engine is opened."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Array, Engine, TensorSpec
    from .fake import FakeEngine

__all__ = ["Array", "Engine", "FakeEngine", "TensorSpec"]

_HOMES = {"Array": "base", "Engine": "base", "FakeEngine": "fake", "TensorSpec": "base"}


def __getattr__(name: str) -> Any:
    """Import a name's module when the name is first used, so that errors and ``latentrt --help`` need no numpy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
