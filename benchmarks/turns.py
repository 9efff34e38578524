"""Work measured in turn within one process, so that changes of the machine's speed affect all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def take_turns(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    rest: float = 0.0,
    before_round: Callable[[int], object] = lambda number: None,
) -> dict[str, list[float]]:
    """Run every piece of work once a round, A B C, B C A, C A B, and time each.

    Args:
        work: The pieces of work by name, in the order of the first round; each round begins with the next one.
        rounds: Rounds that count.
        warm_up: Rounds before those, whose times are left out.
        rest: Seconds to wait before each piece of work.
        before_round: Called before each round with its number: negative during the warm-up, then from 0 on.

    Returns:
        By name, the seconds of each round that counts.
    """
    names = list(work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        before_round(number)
        first = (number + warm_up) % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(rest)
            begin = time.perf_counter()
            work[name]()
            taken = time.perf_counter() - begin
            if number >= 0:
                seconds[name].append(taken)
    return seconds
