"""Moved to :mod:`latentrt.benchmarks.checkpoints.stable_diffusion`; this name keeps working."""

from .checkpoints.stable_diffusion import main as main
from .checkpoints.stable_diffusion import write_checkpoint as write_checkpoint

if __name__ == "__main__":
    raise SystemExit(main())
