"""The order in which one runtime would evict its KV cache: leaves first, least recently used first.

A model of SGLang's radix cache: a leaf that no running request uses may go, the one unused for longest goes
first, whole leaves at a time, and a node whose last child went becomes a leaf in turn.

Evictable leaves stand in a heap by the tick of their last use. An entry is not removed when its leaf is used
again or locked; it is checked when it comes to the top, and put back where it now belongs. Each leaf has at
most one entry, and the entries of leaves that went unasked are cleaned out before they are more than half, so
the heap stays in proportion to the leaves, and every use causes at most one such repair: O(log n) amortised.
The first entries are kept sorted in a short list in front of the heap, so that asking what *would* go costs
O(answer) and not a pop and a push each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TypeAlias

from preble_sgl.core import WorkerId
from preble_sgl.global_sched.node import Node, Share

Entry: TypeAlias = tuple[int, int, Node, Share]
"""Tick of last use, a unique number so that nodes are never compared, the leaf, the worker's share of it."""


class EvictionOrder:
    """The evictable leaves of one worker."""

    __slots__ = ("_front", "_heap", "_num_dead", "_numbers", "_worker_id")

    def __init__(self, worker_id: WorkerId) -> None:
        self._worker_id = worker_id
        self._heap: list[Entry] = []
        self._front: list[Entry] = []  # sorted; nothing in the heap comes before its last entry
        self._numbers = count()
        self._num_dead = 0  # at least as many as there are entries of discarded shares

    def add(self, node: Node, share: Share) -> None:
        """List the node if it may be evicted and is not listed yet. O(log n)."""
        if share.listed or not share.is_evictable:
            return
        share.listed = True
        entry = (share.last_used, next(self._numbers), node, share)
        if self._front and entry < self._front[-1]:
            self._empty_front()
        heappush(self._heap, entry)

    def pop(self) -> Node | None:
        """Take the next victim off the list; None when every leaf is in use. O(log n) amortised."""
        entry = self._peek(0)
        if entry is None:
            return None
        self._front.pop(0)
        entry[3].listed = False
        return entry[2]

    def discard(self, share: Share) -> None:
        """Take a share off the list whose leaf went without being popped. O(1) amortised."""
        share.listed = share.computed = False
        self._num_dead += 1
        if 2 * self._num_dead > len(self):
            self._front = [entry for entry in self._front if entry[3].listed]
            self._heap = [entry for entry in self._heap if entry[3].listed]
            heapify(self._heap)
            self._num_dead = 0

    def __len__(self) -> int:
        return len(self._front) + len(self._heap)

    def first(self, need_len: int) -> list[Node]:
        """Return what would be evicted, in order, to free `need_len` tokens; fewer if there is not enough.

        Changes nothing. O(answer), plus repairs that earlier uses have paid for.
        """
        victims: list[Node] = []
        for node in self._in_order():
            if need_len <= 0:
                break
            victims.append(node)
            need_len -= node.num_tokens
        return victims

    def entries(self) -> Iterator[Entry]:
        """Yield every entry, current or not, in no order."""
        yield from self._front
        yield from self._heap

    def _in_order(self) -> Iterator[Node]:
        """Yield the leaves, and each parent once its last child was yielded."""
        orphans: list[tuple[int, int, Node]] = []
        num_gone: dict[Node, int] = {}
        index = 0
        entry = self._peek(index)
        while entry is not None or orphans:
            if entry is None or (orphans and orphans[0][0] < entry[0]):
                tick, _, node = heappop(orphans)
            else:
                tick, _, node, _ = entry
                index += 1
            yield node
            self._add_orphan(node, tick, num_gone, orphans)
            entry = self._peek(index)

    def _add_orphan(
        self, node: Node, tick: int, num_gone: dict[Node, int], orphans: list[tuple[int, int, Node]]
    ) -> None:
        """Push the node's parent if `node` is the last of its children to go."""
        parent = node.parent
        assert parent is not None
        share = parent.shares.get(self._worker_id)
        if share is None or share.locks:
            return
        num_gone[parent] = num_gone.get(parent, 0) + 1
        if num_gone[parent] == share.num_children:
            heappush(orphans, (max(tick, share.last_used), next(self._numbers), parent))

    def _peek(self, index: int) -> Entry | None:
        """Return the index-th current entry, moving it to the front list."""
        front = self._front
        while True:
            while len(front) <= index:
                if not self._heap:
                    return None
                front.append(heappop(self._heap))
            entry = front[index]
            if entry[3].is_evictable and entry[3].last_used == entry[0]:
                return entry
            del front[index]
            entry[3].listed = False
            self.add(entry[2], entry[3])

    def _empty_front(self) -> None:
        for entry in self._front:
            heappush(self._heap, entry)
        self._front.clear()


@dataclass(slots=True, eq=False)
class WorkerCache:
    """The size of one worker's KV cache and what is in it, in tokens."""

    capacity: int
    order: EvictionOrder
    used: int = 0
