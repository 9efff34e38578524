"""Latent diffusion without PyTorch: a bundle in, pictures out.

Example:
    >>> from latentrt.runtime import Pipeline                              # doctest: +SKIP
    >>> with Pipeline.load("build/emoji") as pipe:                         # doctest: +SKIP
    ...     result = pipe("a red apple", steps=20, seed=7)                 # doctest: +SKIP
    >>> result.images.shape                                                # doctest: +SKIP
    (1, 64, 64, 3)
"""

from __future__ import annotations

from latentrt.engines.errors import (
    BundleError,
    BundleIntegrityError,
    BundleVersionError,
    EngineClosedError,
    EngineError,
    EngineUnavailableError,
    ExportError,
    InvalidRequestError,
    LatentRTError,
    OutputError,
    SourceError,
    TensorMismatchError,
    VerificationError,
)

from .bundle import Bundle
from .pipeline import Pipeline, Result, StepInfo, Timings
from .request import Request

__all__ = [
    "Bundle",
    "BundleError",
    "BundleIntegrityError",
    "BundleVersionError",
    "EngineClosedError",
    "EngineError",
    "EngineUnavailableError",
    "ExportError",
    "InvalidRequestError",
    "LatentRTError",
    "OutputError",
    "Pipeline",
    "Request",
    "Result",
    "SourceError",
    "StepInfo",
    "TensorMismatchError",
    "Timings",
    "VerificationError",
]
