"""Passes over exported graphs: exact transformations found by analysis, blind to what architecture a graph comes from.

Each pass takes an ``onnx_ir`` graph and the names of its inputs by how often they change; none knows a layer's name.
"""
