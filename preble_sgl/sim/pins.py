"""Pins: prefixes that a runtime keeps until an instant, whatever else needs room."""

import heapq
from itertools import count

from preble_sgl.sim.kv_cache import KvCache, KvNode


class Pins:
    """The pinned prefixes of one cache. `max_share`: of its pool, that they may hold together."""

    def __init__(self, cache: KvCache, max_share: float) -> None:
        self._cache = cache
        self._max_len = int(max_share * cache.capacity)
        self._numbers = count()
        self._pins: list[tuple[float, int, KvNode, int]] = []
        self._pinned_len = 0

    @property
    def num_pinned(self) -> int:
        """How many prefixes are pinned."""
        return len(self._pins)

    @property
    def expires_at(self) -> float | None:
        """The instant at which the first pin expires; None if there is none."""
        return self._pins[0][0] if self._pins else None

    def pin(self, namespace: str, packed: bytes, until: float) -> int:
        """Pin what is cached of `packed` until the instant `until`; return its length in tokens.

        0 if nothing is cached, or if it would exceed the share. Prefixes that overlap count twice. O(n + d).
        """
        node = self._cache.match(self._cache.root(namespace), packed, len(packed) // 4)
        if not node.end_len or self._pinned_len + node.end_len > self._max_len:
            return 0
        self._cache.lock(node)
        self._pinned_len += node.end_len
        heapq.heappush(self._pins, (until, next(self._numbers), node, node.end_len))
        return node.end_len

    def expire(self, now: float) -> None:
        """Let go of what was pinned until `now` or earlier."""
        while self._pins and self._pins[0][0] <= now:
            self._drop()

    def drop_all(self) -> bool:
        """Let go of every pin; say whether there was one."""
        had_pins = bool(self._pins)
        while self._pins:
            self._drop()
        return had_pins

    def _drop(self) -> None:
        _, _, node, pinned_len = heapq.heappop(self._pins)
        self._cache.unlock(node)
        self._pinned_len -= pinned_len
