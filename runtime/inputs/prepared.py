"""A request that was checked, with all that is needed to begin its run."""

from __future__ import annotations

from dataclasses import dataclass

from ..families import Text
from ..output.result import Timings
from ..samplers import Plan
from .batch import Batch


@dataclass(frozen=True)
class PreparedRequests:
    """Requests that were checked, before any engine ran, with what each has to encode."""

    batch: Batch
    plan: Plan
    texts: list[list[Text]]
    timings: Timings
