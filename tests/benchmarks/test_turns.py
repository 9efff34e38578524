"""Work in turn."""

from __future__ import annotations

import time

from latentrt.benchmarks.turns import take_turns


def test_each_round_begins_with_the_next_one() -> None:
    """All take their turn in every round; times of the warm-up are left out, and those of the others are their own."""
    order: list[str] = []
    rounds: list[int] = []
    seconds = {"a": 0.0, "b": 0.02, "c": 0.0}

    def turn(name: str) -> None:
        order.append(name)
        time.sleep(seconds[name])

    found = take_turns({name: lambda n=name: turn(n) for name in seconds}, 2, warm_up=2, before_round=rounds.append)  # type: ignore[misc]
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert rounds == [-2, -1, 0, 1]
    assert {name: len(taken) for name, taken in found.items()} == {"a": 2, "b": 2, "c": 2}
    assert min(found["b"]) >= 0.02 > max(found["a"])
