"""Passes over exported graphs: exact rewrites, quantisation, and the split of a denoiser into stages.

Each module is one pass. It takes an ``onnx_ir`` graph, and finds what it changes by operators, shapes and dependencies
between values; no pass knows the name of a layer or the architecture that a graph comes from. A docstring numbers the
cases or steps of its pass, and the code refers to them by these numbers.
"""
