"""Measurements of LatentRT, each a module to run with ``python -m``: time, memory, and the quality reached.

:mod:`latentrt.benchmarks.build_sd15_unet` builds a plan of a U-Net of Stable Diffusion 1.5's size.
:mod:`latentrt.benchmarks.checkpoint` writes a model of that size with random weights.
:mod:`latentrt.benchmarks.step_time` times a step of the denoising loop, fused against plain.
"""
