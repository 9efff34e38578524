"""Measurements of LatentRT: time, memory and quality, beside other runtimes.

``latentrt bench`` (:mod:`latentrt.benchmarks.cli`) measures a bundle. The other programs run with ``python -m``:

- :mod:`latentrt.benchmarks.checkpoints.write` writes a model of a real one's size with random weights.
- :mod:`latentrt.benchmarks.mlperf.loadgen` runs MLPerf's scenarios.
- :mod:`latentrt.benchmarks.studies.against_torch` compares a step or the decoder with diffusers.
- :mod:`latentrt.benchmarks.studies.build_sd15_unet` builds a plan of a U-Net of Stable Diffusion 1.5's size.
- :mod:`latentrt.benchmarks.studies.gpu_check` checks a machine with a GPU.
- :mod:`latentrt.benchmarks.studies.host_time` times the host's share of a step with ControlNets.
- :mod:`latentrt.benchmarks.studies.lora_switch` times switching LoRAs.
- :mod:`latentrt.benchmarks.studies.step_time` times a step of the denoising loop, fused and plain.
- :mod:`latentrt.benchmarks.studies.winograd` times convolutions by tiles.
"""
