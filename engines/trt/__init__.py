"""TensorRT and TensorRT-RTX, in one implementation that takes the SDK as an argument.

Importing this imports no SDK; :func:`load_sdk` does.
"""

from __future__ import annotations

from .build import BuildOptions, build_plan, build_target
from .profile import Profile, Range, ShapeRange, parse_ranges
from .progress import Progress
from .sdk import SDK_MODULES, Sdk, load_sdk
from .session import TensorRTEngine

__all__ = [
    "SDK_MODULES",
    "BuildOptions",
    "Profile",
    "Progress",
    "Range",
    "Sdk",
    "ShapeRange",
    "TensorRTEngine",
    "build_plan",
    "build_target",
    "load_sdk",
    "parse_ranges",
]
