"""The order of the wait queue inside one runtime. Pure: an order is a function of what waits.

- `fcfs`: as they came.
- `lpm`, longest prefix match, as SGLang: most cached tokens first. Of requests with next to nothing cached
  that begin alike only the first keeps its place, so that the others find what it computes (in-batch
  sharing). With more than MAX_MATCHED waiting, SGLang matches nothing and takes them as they stand.
- `preble_groups`, Preble's local scheduler (its section 3): NUM_GROUPS groups by cached share of the prompt;
  in turns, as many of each group as its number says, so that well cached requests go first and none starves.
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

WaitOrder = Literal["fcfs", "lpm", "preble_groups"]

MAX_MATCHED = 128
SHARED_LEN = 32
"""Tokens: who has no more than so many cached is checked against the others for so many in common."""
NUM_GROUPS = 10


class Waiting(Protocol):
    """What an order looks at. `beginning`: namespace and first SHARED_LEN tokens; None for a short prompt."""

    @property
    def matched_len(self) -> int: ...
    @property
    def total_len(self) -> int: ...
    @property
    def beginning(self) -> object: ...


W = TypeVar("W", bound=Waiting)


def by_longest_match(waiting: Sequence[W]) -> list[W]:
    """Return the order of `lpm`. O(n log n)."""
    seen: set[object] = set()
    first: list[W] = []
    later: list[W] = []
    for one in waiting:
        if one.matched_len <= SHARED_LEN and one.beginning is not None:
            (later if one.beginning in seen else first).append(one)
            seen.add(one.beginning)
        else:
            first.append(one)
    first.sort(key=_least_matched_last)
    return first + later


def by_groups(waiting: Sequence[W]) -> list[W]:
    """Return the order of `preble_groups`: turns of 10 of group 10, 9 of group 9, ... 1 of group 1. O(n)."""
    groups: list[deque[W]] = [deque() for _ in range(NUM_GROUPS + 1)]
    for one in waiting:
        groups[group_of(one)].append(one)
    ordered: list[W] = []
    while len(ordered) < len(waiting):
        for number in range(NUM_GROUPS, 0, -1):
            group = groups[number]
            ordered.extend(group.popleft() for _ in range(min(number, len(group))))
    return ordered


def group_of(one: Waiting) -> int:
    """Return the group of a request, 1 to NUM_GROUPS: 63 of 100 tokens cached are in group 6."""
    return max(1, NUM_GROUPS * one.matched_len // one.total_len)


def _least_matched_last(one: Waiting) -> int:
    return -one.matched_len
