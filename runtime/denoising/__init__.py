"""The denoising loop: runs, batches of runs, and the two ways to take a step."""
