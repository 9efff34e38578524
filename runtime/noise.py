"""Moved to :mod:`latentrt.runtime.samplers.noise`; this name keeps working."""

from .samplers.noise import TorchGenerator as TorchGenerator
from .samplers.noise import torch_randn as torch_randn
