"""Lagrange's polynomials for multistep samplers are scipy's, and two equal nodes have none."""

from __future__ import annotations

import numpy as np
import pytest

from latentrt.runtime.samplers.lagrange import lagrange_basis


@pytest.mark.parametrize("nodes", [(3.0,), (0.5, -1.0), (14.6, 6.5, 3.9, 2.1)])
def test_polynomials_are_scipys(nodes: tuple[float, ...]) -> None:
    """Each goes through one at its own node and through zero at the others."""
    interpolate = pytest.importorskip("scipy.interpolate")
    points = np.linspace(-2, 16, 7)
    for i in range(len(nodes)):
        expected = interpolate.lagrange(nodes, np.eye(len(nodes))[i])
        np.testing.assert_allclose(lagrange_basis(nodes, i)(points), expected(points), rtol=1e-9, atol=1e-9)


def test_equal_nodes_have_no_polynomial() -> None:
    """No polynomial is one and zero at the same place."""
    with pytest.raises(ZeroDivisionError):
        lagrange_basis((1.0, 2.0, 1.0), 0)
