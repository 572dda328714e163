"""Requests that wait for room: whose turn it is, and the order that keeps shared prefixes together.

Three questions in turn decide who is next:

1. *Whose?* The tenant that was served least (fairness.py), if fairness is on.
2. *How urgent?* The highest priority; each AGING_S of waiting is worth one level, so that nothing starves.
3. *Which?* In depth-first order the neighbour, in the order of prompts, of the request placed last: sorted
   prompts are the prefix tree read depth first, so the neighbour shares the longest prefix, and the requests
   of one prefix run together. If no neighbour shares much, or someone has waited longer than AGING_S, the
   first in line: earliest deadline, then the program that came first.
   With *short first*, whoever has waited longest for each token that it misses (the highest response ratio;
   Brinch Hansen, 1971): requests whose prefix is cached pass those that have to be computed in full, but not
   for ever. The neighbour misses only what it does not share; a deadline goes before all.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import inf
from operator import attrgetter

from preble_sgl.core import RequestId, WorkerId, common_prefix_len
from preble_sgl.global_sched.bindings import Queued
from preble_sgl.global_sched.policies.protocol import Decision
from preble_sgl.global_sched.prefix_first import MIN_SHARED_LEN

AGING_S = 30.0
"""Seconds of waiting that are worth one level of priority."""

RATIO_AMONG = 64
"""So many of the first in line are compared by their response ratio."""

RATIO_START_S = 1.0
"""Seconds that everyone is taken to have waited already, so that new requests compare by what they miss."""

Turn = Callable[[Iterable[str]], str]
"""Picks the tenant whose turn it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A request in a backlog.

    `rank`: its place in line. `decision`: the worker it was meant for, if any. `work_s`: the seconds that it
    is expected to keep that worker busy. `missed_len`: prompt tokens to compute there. `opens`: its program
    was opened there for it.
    """

    queued: Queued
    rank: tuple[float, int, int]
    decision: Decision | None = None
    work_s: float = 0.0
    missed_len: int = 0
    opens: bool = False

    @property
    def key(self) -> tuple[str, bytes, int]:
        """Its place in depth-first order."""
        return (self.queued.request.namespace, self.queued.packed, self.queued.number)

    def response_ratio(self, now: float, missed_len: int) -> float:
        """Return how long it has waited for each of `missed_len` tokens."""
        return (now - self.queued.submitted_at + RATIO_START_S) / max(1, missed_len)


class _Line:
    """The waiting requests of one tenant and priority, in line and in depth-first order."""

    __slots__ = ("_keys", "_ranks", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}
        self._keys: list[tuple[str, bytes, int]] = []
        self._ranks: list[tuple[float, int, int]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    def add(self, waiting: Waiting) -> None:
        self._waiting[waiting.queued.number] = waiting
        insort(self._keys, waiting.key)
        insort(self._ranks, waiting.rank)

    def remove(self, waiting: Waiting) -> None:
        del self._waiting[waiting.queued.number]
        del self._keys[bisect_left(self._keys, waiting.key)]
        del self._ranks[bisect_left(self._ranks, waiting.rank)]

    def first(self) -> Waiting:
        return self._waiting[self._ranks[0][-1]]

    def last(self) -> Waiting:
        return self._waiting[self._ranks[-1][-1]]

    def first_few(self, num: int) -> list[Waiting]:
        """Return the first in line, at most `num`."""
        return [self._waiting[rank[-1]] for rank in self._ranks[:num]]

    def neighbours(self, namespace: str, packed: bytes) -> Iterator[tuple[int, Waiting]]:
        """Yield the requests next to a prompt in depth-first order, with the tokens they share with it."""
        at = bisect_left(self._keys, (namespace, packed, 0))
        for key in self._keys[max(0, at - 1) : at + 1]:
            if key[0] == namespace:
                yield common_prefix_len(key[1], packed), self._waiting[key[2]]


class Backlog:
    """Requests that wait for the same thing. `work_s`: the sum of what they are expected to take."""

    def __init__(self, *, depth_first: bool = False, short_first: bool = False) -> None:
        self._depth_first = depth_first
        self._short_first = short_first
        self._lines: dict[tuple[str, int], _Line] = {}
        self._by_id: dict[RequestId, Waiting] = {}
        self._last: dict[WorkerId, Queued] = {}
        self.work_s = 0.0

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._by_id.values())

    def add(self, waiting: Waiting) -> None:
        """Let a request wait. O(log n) comparisons."""
        request = waiting.queued.request
        self._by_id[request.request_id] = waiting
        self._lines.setdefault((request.tenant, request.priority), _Line()).add(waiting)
        self.work_s += waiting.work_s

    def remove(self, request_id: RequestId) -> Waiting:
        """Take a request out, because it was placed or given up."""
        waiting = self._by_id.pop(request_id)
        request = waiting.queued.request
        line = self._lines[request.tenant, request.priority]
        line.remove(waiting)
        if not line:
            del self._lines[request.tenant, request.priority]
        self.work_s = self.work_s - waiting.work_s if self._by_id else 0.0
        return waiting

    def placed(self, queued: Queued, worker_id: WorkerId) -> None:
        """Remember what was placed last on a worker: depth-first order goes on from there."""
        self._last[worker_id] = queued

    def next(self, now: float, turn: Turn | None) -> Waiting:
        """Return the request whose turn it is; leaves it in. O(tenants x priorities + log n)."""
        tenants = {tenant for tenant, _ in self._lines}
        chosen = turn(tenants) if turn else None
        lines = [line for (tenant, _), line in self._lines.items() if chosen is None or tenant == chosen]
        line = max(lines, key=lambda line: _urgency(line.first(), now))
        first = line.first()
        near = self._neighbours(line) if self._depth_first else []
        if self._short_first:
            return first if first.rank[0] < inf else _longest_wait(line, near, now)
        if not near or now - first.queued.submitted_at > AGING_S:
            return first
        return max(near, key=lambda found: found[0])[1]

    def _neighbours(self, line: _Line) -> list[tuple[int, Waiting]]:
        """Return the requests that share much with one placed last, and how much."""
        last = self._last.values()
        found = chain.from_iterable(line.neighbours(one.request.namespace, one.packed) for one in last)
        return [(shared_len, waiting) for shared_len, waiting in found if shared_len >= MIN_SHARED_LEN]

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Go on from nothing that was placed on a worker that is gone."""
        self._last.pop(worker_id, None)

    def last(self) -> Waiting:
        """Return the request that came last in line: the one to give away. O(tenants x priorities)."""
        return max((line.last() for line in self._lines.values()), key=attrgetter("rank"))

    def shared_len(self, namespace: str, packed: bytes) -> int:
        """Return the longest prefix, in tokens, that a prompt shares with a waiting one. O(log n)."""
        near = chain.from_iterable(line.neighbours(namespace, packed) for line in self._lines.values())
        return max((shared for shared, _ in near), default=0)

    def check_invariants(self) -> None:
        """Assert that lines, sums and the index agree."""
        listed = [waiting for line in self._lines.values() for waiting in line]
        assert {waiting.queued.request_id for waiting in listed} == self._by_id.keys()
        assert len(listed) == len(self._by_id)
        assert all(self._lines.values()), "an empty line"
        assert abs(self.work_s - sum(waiting.work_s for waiting in listed)) < 1e-6 * max(1.0, self.work_s)


def _longest_wait(line: _Line, near: Iterable[tuple[int, Waiting]], now: float) -> Waiting:
    """Return who has waited longest for what it misses; a neighbour misses what it does not share."""
    missed = {id(one): (one.missed_len, one) for one in line.first_few(RATIO_AMONG)}
    for shared_len, one in near:
        missed_len = max(0, one.missed_len - shared_len)
        missed[id(one)] = min(missed_len, missed.get(id(one), (missed_len, one))[0]), one
    return max(missed.values(), key=lambda found: found[1].response_ratio(now, found[0]))[1]


def _urgency(waiting: Waiting, now: float) -> tuple[float, tuple[float, ...]]:
    """Return what the most urgent has most of: priority with aging, then the place in line."""
    aged = waiting.queued.request.priority + (now - waiting.queued.submitted_at) / AGING_S
    return aged, tuple(-part for part in waiting.rank)
