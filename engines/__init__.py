"""Inference SDKs behind one small protocol. Nothing here imports an SDK before an engine is opened."""

from __future__ import annotations

from .base import Array, Engine, TensorSpec
from .fake import FakeEngine

__all__ = ["Array", "Engine", "FakeEngine", "TensorSpec"]
