"""What a bounded cache keeps and lets go of."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from latentrt.engines import Array
from latentrt.runtime.text_encoding.cache import TensorCache


def tensors(size: int) -> dict[str, Array]:
    """A set of ``size`` bytes in two tensors."""
    return {"a": np.zeros(size // 2, np.uint8), "b": np.zeros(size - size // 2, np.uint8)}


def test_the_least_recently_used_leaves_first() -> None:
    """Looking a set up makes it the most recently used one."""
    cache = TensorCache(30)
    for key in "abc":
        cache.put(key, tensors(10))
    assert cache.get("a") is not None
    cache.put("d", tensors(10))
    assert cache.get("b") is None
    assert all(cache.get(key) is not None for key in "acd")
    assert (cache.nbytes, len(cache)) == (30, 3)


def test_a_key_that_comes_again_replaces() -> None:
    """Its older set is no longer counted."""
    cache = TensorCache(30)
    cache.put("a", tensors(10))
    larger = tensors(20)
    cache.put("a", larger)
    assert cache.get("a") is larger
    assert (cache.nbytes, len(cache)) == (20, 1)


@pytest.mark.parametrize("limit", [0, 9])
def test_what_does_not_fit_is_not_kept(limit: int) -> None:
    """A set that is larger than the whole cache drives nothing out."""
    cache = TensorCache(limit)
    cache.put("small", tensors(limit))
    cache.put("large", tensors(10))
    assert cache.get("large") is None
    assert cache.get("small") is not None
    assert cache.nbytes == limit


def test_clearing_lets_go_of_everything() -> None:
    """Nothing is held and nothing is counted afterwards."""
    cache = TensorCache(30)
    cache.put("a", tensors(10))
    cache.clear()
    assert cache.get("a") is None
    assert (cache.nbytes, len(cache)) == (0, 0)


def test_many_threads() -> None:
    """However threads interleave, the count is what is held and the bound is kept."""
    cache = TensorCache(100)

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(500):
            key, size = int(generator.integers(20)), int(generator.integers(1, 40))
            if (found := cache.get(key)) is not None:
                assert set(found) == {"a", "b"}
            cache.put(key, tensors(size))
            assert cache.nbytes <= 100 + 40, "one set too many at most, while its put is under way"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    held = [found for key in range(20) if (found := cache.get(key)) is not None]
    assert cache.nbytes == sum(array.nbytes for found in held for array in found.values()) <= 100
    assert len(cache) == len(held)
