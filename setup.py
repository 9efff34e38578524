"""Packages are found by a scan of the layers; all else that setuptools needs is in pyproject.toml."""

from setuptools import find_packages, setup

LAYERS = ("engines", "runtime", "exporter", "serving", "benchmarks")

setup(packages=[f"latentrt.{name}" for layer in LAYERS for name in find_packages(include=[layer, f"{layer}.*"])])
