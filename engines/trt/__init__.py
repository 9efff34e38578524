"""TensorRT and TensorRT-RTX, in one implementation that takes the SDK as an argument.

Importing this imports no SDK; :func:`load_sdk` does. The modules here are imported when a name of theirs is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import BuildOptions, build_plan, build_target
    from .memory import Arena, CudaArray, MemoryNeeds
    from .plan import SessionOptions
    from .profile import Profile, Range, ShapeRange, parse_ranges
    from .progress import Progress
    from .sdk import SDK_MODULES, Sdk, load_sdk
    from .session import TensorRTEngine, share_arena

__all__ = [
    "SDK_MODULES",
    "Arena",
    "BuildOptions",
    "CudaArray",
    "MemoryNeeds",
    "Profile",
    "Progress",
    "Range",
    "Sdk",
    "SessionOptions",
    "ShapeRange",
    "TensorRTEngine",
    "build_plan",
    "build_target",
    "load_sdk",
    "parse_ranges",
    "share_arena",
]

_HOMES = {
    "Arena": "memory",
    "BuildOptions": "build",
    "CudaArray": "memory",
    "MemoryNeeds": "memory",
    "Profile": "profile",
    "Progress": "progress",
    "Range": "profile",
    "SDK_MODULES": "sdk",
    "Sdk": "sdk",
    "SessionOptions": "plan",
    "ShapeRange": "profile",
    "TensorRTEngine": "session",
    "build_plan": "build",
    "build_target": "build",
    "load_sdk": "sdk",
    "parse_ranges": "profile",
    "share_arena": "session",
}


def __getattr__(name: str) -> Any:
    """Import a name's module when the name is first used: who runs on a CPU loads nothing of this."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
