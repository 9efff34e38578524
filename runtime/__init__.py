"""Latent diffusion without PyTorch: a bundle in, images out.

Example:
    >>> from latentrt.runtime import Pipeline                              # doctest: +SKIP
    >>> with Pipeline.load("build/emoji") as pipe:                         # doctest: +SKIP
    ...     result = pipe("a red apple", steps=20, seed=7)                 # doctest: +SKIP
    >>> result.images.shape                                                # doctest: +SKIP
    (1, 64, 64, 3)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from latentrt.engines.errors import (
    BundleError,
    BundleIntegrityError,
    BundleVersionError,
    EngineClosedError,
    EngineError,
    EngineMemoryError,
    EngineUnavailableError,
    ExportError,
    InvalidRequestError,
    LatentRTError,
    OutputError,
    SourceError,
    TensorMismatchError,
    VerificationError,
)

if TYPE_CHECKING:
    __version__: str

    from .bundle.reader import Bundle
    from .denoising.run import Run
    from .inputs.create import create_request
    from .inputs.refine import hand_over_options
    from .output.previews import Preview
    from .output.result import Result, StepInfo, Timings
    from .pipeline import Pipeline
    from .request.control import Control
    from .request.options import RequestOptions
    from .request.request import Request
    from .vae.tiling import Tiling

__all__ = [
    "Bundle",
    "BundleError",
    "BundleIntegrityError",
    "BundleVersionError",
    "Control",
    "EngineClosedError",
    "EngineError",
    "EngineMemoryError",
    "EngineUnavailableError",
    "ExportError",
    "InvalidRequestError",
    "LatentRTError",
    "OutputError",
    "Pipeline",
    "Preview",
    "Request",
    "RequestOptions",
    "Result",
    "Run",
    "SourceError",
    "StepInfo",
    "TensorMismatchError",
    "Tiling",
    "Timings",
    "VerificationError",
    "create_request",
    "hand_over_options",
]

_HOMES = {
    "Bundle": "bundle.reader",
    "Control": "request.control",
    "Pipeline": "pipeline",
    "Preview": "output.previews",
    "Request": "request.request",
    "RequestOptions": "request.options",
    "Result": "output.result",
    "Run": "denoising.run",
    "StepInfo": "output.result",
    "Tiling": "vae.tiling",
    "Timings": "output.result",
    "create_request": "inputs.create",
    "hand_over_options": "inputs.refine",
}


def __getattr__(name: str) -> Any:
    """Import a name's module when the name is first used: ``latentrt --help`` waits for none of them.

    ``__version__`` is that of the installed package.
    """
    if name == "__version__":
        from importlib.metadata import version

        return version("latentrt")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
