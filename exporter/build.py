"""Moved to :mod:`latentrt.exporter.builder.build`; this name keeps working."""

from .builder.build import build_bundle as build_bundle
from .builder.request import BuildRequest as BuildRequest
