"""Moved to :mod:`latentrt.benchmarks.studies.host_time`; this name keeps working."""

from .studies.host_time import main as main

if __name__ == "__main__":
    raise SystemExit(main())
