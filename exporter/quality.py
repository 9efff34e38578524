"""Moved to :mod:`latentrt.exporter.precision.quality`; this name keeps working."""

from .precision.quality import picture_psnr as picture_psnr
from .precision.quality import picture_ssim as picture_ssim
