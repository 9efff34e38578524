"""Other runtimes that LatentRT is measured against, each a program in a virtual environment of its own.

LatentRT is not installed in those environments, so the programs and the modules that they share import nothing of it;
only :mod:`latentrt.benchmarks.peers.environments`, which makes the environments, runs beside LatentRT.
"""
