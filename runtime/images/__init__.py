"""Images: PNG files with their parameters, reading what callers give, masks, pixels for CLIP."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .png import GenerationParameters, read_parameters, sheet, write_png

__all__ = ["GenerationParameters", "read_parameters", "sheet", "write_png"]


def __getattr__(name: str) -> Any:
    """Import :mod:`.png` when one of its names is first used: whoever draws need not write a file."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".png", __name__), name)
