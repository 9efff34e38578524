"""Moved to :mod:`latentrt.benchmarks.checkpoints.write`; this name keeps working."""

from .checkpoints.stable_diffusion import write_checkpoint as write_checkpoint
from .checkpoints.write import main as main

if __name__ == "__main__":
    raise SystemExit(main())
