"""The terms of a test: scenario, length, and what makes a run valid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from latentrt.engines.checks import check_choice, check_integer, is_number, show
from latentrt.engines.errors import InvalidRequestError

SCENARIOS = ("SingleStream", "Offline", "Server")
"""Scenarios of MLPerf inference that can be run."""

FEWEST_QUERIES = {"SingleStream": 64, "Offline": 24, "Server": 459}
"""Queries that a short run should have at least.

For SingleStream and Server, loadgen calls a run with fewer invalid (``early_stopping.cc``). It must be 99 % sure of the
percentile: for the 90th of SingleStream that takes 64 queries, for the 99th of Server 459, if none of them is late.
Offline has no such limit; this many make an average.
"""


@dataclass(frozen=True)
class Terms:
    """The terms of one test, checked.

    Attributes:
        scenario: One of :data:`SCENARIOS`.
        min_duration_seconds: Shortest duration of the run.
        min_queries: Fewest queries of the run.
        target_qps: Server: queries a second. Else images a second to expect; ``None`` to measure that before.
        target_latency_seconds: Server: the latency above which a query is late.
        batch: Most images that are drawn together.
        percentile: Server: share of queries that must not be late; ``None`` is MLPerf's 0.99.

    Raises:
        InvalidRequestError: for a value that is out of range, or that the scenario does not have.
    """

    scenario: str
    min_duration_seconds: float
    min_queries: int
    target_qps: float | None = None
    target_latency_seconds: float | None = None
    batch: int = 1
    percentile: float | None = None

    def __post_init__(self) -> None:
        check_choice("scenario", self.scenario, SCENARIOS)
        for name in ("min_duration_seconds", "target_qps", "target_latency_seconds"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise InvalidRequestError(f"{name} is {show(value)}, expected a number above 0")
        for name in ("min_queries", "batch"):
            check_integer(name, getattr(self, name), 1)
        if self.percentile is not None:
            _check_percentile(self.percentile)
        if self.scenario == "SingleStream" and self.batch > 1:
            raise InvalidRequestError(f"batch is {self.batch}, and SingleStream has one query at a time; leave it at 1")
        if self.scenario == "Server" and (self.target_qps is None or self.target_latency_seconds is None):
            raise InvalidRequestError("Server needs a target_qps and a target_latency_seconds; give both")
        if self.scenario != "Server" and (self.target_latency_seconds is not None or self.percentile is not None):
            raise InvalidRequestError(f"{self.scenario} has no target latency; leave it and its percentile out")

    def settings(self, expected: float) -> dict[str, Any]:
        """The fields of loadgen's ``TestSettings`` that state these terms.

        Args:
            expected: Images a second to expect.
        """
        settings: dict[str, Any] = {
            "min_duration_ms": max(1, round(1e3 * self.min_duration_seconds)),
            "min_query_count": self.min_queries,
        }
        if self.scenario == "SingleStream":
            settings["single_stream_expected_latency_ns"] = 1e9 / expected
        elif self.scenario == "Offline":
            settings["offline_expected_qps"] = expected
        else:
            assert self.target_latency_seconds is not None, "checked above"
            settings["server_target_qps"] = expected
            settings["server_target_latency_ns"] = round(1e9 * self.target_latency_seconds)
            if self.percentile is not None:
                settings["server_target_latency_percentile"] = self.percentile
        return settings


def fewest_queries(scenario: str, percentile: float | None = None) -> int:
    """:data:`FEWEST_QUERIES`, and for Server the number for any percentile.

    Args:
        scenario: One of :data:`SCENARIOS`.
        percentile: Server: share of queries that must not be late; ``None`` is MLPerf's 0.99.

    Raises:
        InvalidRequestError: if the percentile is no share.
    """
    if scenario != "Server" or percentile is None:
        return FEWEST_QUERIES[scenario]
    _check_percentile(percentile)
    return math.ceil(math.log(0.01) / math.log(percentile))


def _check_percentile(percentile: object) -> None:
    if not is_number(percentile) or not 0 < percentile < 1:
        raise InvalidRequestError(f"percentile is {show(percentile)}, expected a share between 0 and 1, such as 0.99")
