"""Measurements of LatentRT: time, memory, and the quality reached.

``latentrt bench`` (:mod:`latentrt.benchmarks.cli`) measures a bundle beside other runtimes. The rest are modules to run
with ``python -m``:

:mod:`latentrt.benchmarks.studies.build_sd15_unet` builds a plan of a U-Net of Stable Diffusion 1.5's size.
:mod:`latentrt.benchmarks.checkpoints.stable_diffusion` writes a model of that size with random weights.
:mod:`latentrt.benchmarks.studies.gpu_check` checks what only a GPU can tell.
:mod:`latentrt.benchmarks.mlperf.loadgen` runs MLPerf's scenarios.
:mod:`latentrt.benchmarks.studies.step_time` times a step of the denoising loop, fused against plain.
"""
