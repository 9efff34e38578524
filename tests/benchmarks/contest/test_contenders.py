"""The table of contenders, and choosing from it."""

from __future__ import annotations

import pytest

from latentrt.benchmarks.contest.contenders import PEERS, chosen, known
from latentrt.engines.errors import InvalidRequestError


def test_contenders_are_chosen_by_name() -> None:
    """Names are known, peers stands for all of them, twice is once, and a wrong one is refused with the right ones."""
    names = [contender.name for contender in chosen(["latentrt-openvino-int8", "peers", "diffusers-fp32"])]
    assert names[0] == "latentrt-openvino-int8"
    assert names[1:] == [peer.name for peer in PEERS]
    assert len(known()) == len({contender.label for contender in known().values()})
    with pytest.raises(InvalidRequestError, match="unknown contender 'pytorch'"):
        chosen(["pytorch"])
