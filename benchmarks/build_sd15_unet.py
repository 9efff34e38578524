"""Moved to :mod:`latentrt.benchmarks.studies.build_sd15_unet`; this name keeps working."""

from .studies.build_sd15_unet import main as main

if __name__ == "__main__":
    raise SystemExit(main())
