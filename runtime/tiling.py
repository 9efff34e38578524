"""Moved to :mod:`latentrt.runtime.vae.tiling`; this name keeps working."""

from .vae.tiling import Tiling as Tiling
from .vae.tiling import decode_tiles as decode_tiles
from .vae.tiling import encode_tiles as encode_tiles
