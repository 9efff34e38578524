"""Commands of ``latentrt`` that need the exporter."""
