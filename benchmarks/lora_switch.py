"""Moved to :mod:`latentrt.benchmarks.studies.lora_switch`; this name keeps working."""

from .studies.lora_switch import main as main

if __name__ == "__main__":
    raise SystemExit(main())
