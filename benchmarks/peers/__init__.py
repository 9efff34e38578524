"""Other runtimes that LatentRT is measured against, each a program in a virtual environment of its own.

Their programs must not import anything of LatentRT, which is not installed there;
:mod:`latentrt.benchmarks.peers.wire` is all they share.
"""
