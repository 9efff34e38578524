"""Interpolation of a history of outputs, for linear multistep samplers."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.polynomial import Polynomial


def lagrange_basis(nodes: Sequence[float], i: int) -> Polynomial:
    """The polynomial that is one at ``nodes[i]`` and zero at the other nodes.

    Raises:
        ZeroDivisionError: if another node equals ``nodes[i]``.
    """
    basis = Polynomial([1.0])
    for k, node in enumerate(nodes):
        if k != i:
            basis = basis * Polynomial([-node, 1.0]) / (nodes[i] - node)
    return basis
