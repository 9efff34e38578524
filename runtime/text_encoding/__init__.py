"""From prompts to the denoiser's conditioning, and the cache of encoded prompts."""
