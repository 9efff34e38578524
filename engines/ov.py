"""Moved to :mod:`latentrt.engines.openvino.engine`; this name keeps working."""

from .openvino.engine import OpenVinoEngine as OpenVinoEngine
from .openvino.engine import OpenVinoOptions as OpenVinoOptions
