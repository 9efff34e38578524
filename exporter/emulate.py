"""Moved to :mod:`latentrt.exporter.verification.emulate`; this name keeps working."""

from .verification.emulate import emulated as emulated
