"""TensorRT and TensorRT-RTX, in one implementation that takes the SDK as an argument.

Importing this imports no SDK; :func:`load_sdk` does.
"""

from __future__ import annotations

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
