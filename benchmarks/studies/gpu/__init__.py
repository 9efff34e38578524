"""Checks of plans on a GPU, each against the plain way to compute the same; ``gpu_check`` runs them all."""
