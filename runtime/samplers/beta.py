"""Quantiles of the beta distribution, for the beta spacing of noise levels."""

from __future__ import annotations

import math


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x at which the Beta(a, b) distribution's cumulative probability is ``p``.

    Bisection on the regularised incomplete beta function, down to neighbouring floats.

    Args:
        p: Probability, 0 to 1.
        a: Shape, above zero.
        b: Shape, above zero.
    """
    if p <= 0:
        return 0.0
    if p >= 1:
        return 1.0
    # The tail above one half is the tail below it of the mirrored distribution.
    if p > _regularised(0.5, a, b):
        return 1.0 - _bisect(1.0 - p, b, a)
    return _bisect(p, a, b)


def _bisect(p: float, a: float, b: float) -> float:
    low, high = 0.0, 0.5
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if _regularised(middle, a, b) < p:
            low = middle
        else:
            high = middle


def _regularised(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b) for 0 < x <= 1/2, by its hypergeometric series (DLMF 8.17.8)."""
    logarithm = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    total, term, n = 1.0, 1.0, 0
    while term > 1e-17 * total:
        term *= (a + b + n) / (a + 1 + n) * x
        total += term
        n += 1
    return math.exp(logarithm) * total / a
