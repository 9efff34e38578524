"""Results that are kept while there is room, the least recently used leaving first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping

from latentrt.engines import Array


class TensorCache:
    """Sets of tensors by key, bounded in bytes. Safe from many threads; what it holds must not be changed.

    Args:
        limit: Most bytes to hold; a set that is larger alone is not kept, and 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._sets: OrderedDict[Hashable, Mapping[str, Array]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Mapping[str, Array] | None:
        """The set of ``key``, which then is the most recently used one."""
        with self._lock:
            if key in self._sets:
                self._sets.move_to_end(key)
            return self._sets.get(key)

    def put(self, key: Hashable, tensors: Mapping[str, Array]) -> None:
        """Keep a set, and let go of the least recently used ones that no longer fit."""
        size = _nbytes(tensors)
        if size > self._limit:
            return
        with self._lock:
            if (older := self._sets.pop(key, None)) is not None:
                self._bytes -= _nbytes(older)
            self._sets[key] = tensors
            self._bytes += size
            while self._bytes > self._limit:
                _, oldest = self._sets.popitem(last=False)
                self._bytes -= _nbytes(oldest)

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._sets.clear()
            self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self._bytes

    def __len__(self) -> int:
        """Sets that are held."""
        return len(self._sets)


def _nbytes(tensors: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in tensors.values())
