"""Moved to :mod:`latentrt.benchmarks.studies.against_torch`; this name keeps working."""

from .studies.against_torch import main as main

if __name__ == "__main__":
    raise SystemExit(main())
