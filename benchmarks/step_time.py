"""Moved to :mod:`latentrt.benchmarks.studies.step_time`; this name keeps working."""

from .studies.step_time import main as main

if __name__ == "__main__":
    raise SystemExit(main())
