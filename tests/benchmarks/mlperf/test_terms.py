"""The terms of a test: how many queries it needs."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from latentrt.benchmarks.mlperf.terms import fewest_queries


@pytest.mark.parametrize("percentile", [None, 0.9, 0.95])
def test_the_fewest_queries_of_a_server_run(percentile: float | None) -> None:
    """Were more late than allowed, so many queries, and no fewer, would all be in time with less than 1 % chance."""
    queries, late = fewest_queries("Server", percentile), 1 - (percentile or 0.99)
    assert binom.cdf(0, queries, late) <= 0.01 < binom.cdf(0, queries - 1, late)
