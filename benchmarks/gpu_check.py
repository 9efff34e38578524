"""Moved to :mod:`latentrt.benchmarks.studies.gpu_check`; this name keeps working."""

from .studies.gpu_check import main as main

if __name__ == "__main__":
    raise SystemExit(main())
