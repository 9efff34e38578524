"""The VAE: decoding and encoding, whole or in tiles."""
