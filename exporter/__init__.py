"""From a diffusers directory to a bundle: ONNX graphs checked against torch, and compiled engines.

Needs the extra ``export``. Importing this package imports nothing;
:func:`latentrt.exporter.builder.build.build_bundle` does what ``latentrt build-engine`` does.
"""
