"""Moved to :mod:`latentrt.benchmarks.mlperf.loadgen`; this name keeps working."""

from .mlperf.loadgen import main as main
from .mlperf.loadgen import run_loadgen as run_loadgen

if __name__ == "__main__":
    raise SystemExit(main())
