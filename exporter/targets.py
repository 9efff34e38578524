"""Moved to :mod:`latentrt.exporter.graphs.targets`; this name keeps working."""

from .graphs.targets import PORTABLE as PORTABLE
from .graphs.targets import TARGETS as TARGETS
from .graphs.targets import Form as Form
