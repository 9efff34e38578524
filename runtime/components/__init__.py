"""From an engine's name to opened engines of a bundle's components."""
