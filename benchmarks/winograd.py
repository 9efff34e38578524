"""Moved to :mod:`latentrt.benchmarks.studies.winograd`; this name keeps working."""

from .studies.winograd import main as main

if __name__ == "__main__":
    raise SystemExit(main())
