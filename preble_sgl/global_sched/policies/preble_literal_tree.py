"""The prefix tree of `preble_literal`: the history of all requests, as in Preble's `global_lru_cache.py`.

It is history and not cache: a node stays for ever, whatever the runtimes have evicted. What a worker is
*believed* to cache follows from the requests sent to it and from a simulated LRU against KV_TOKENS.

Kept as they are there: every eviction, simulated or only imagined, looks at every node and not at the leaves
alone; nodes are ordered by their reference counts on *all* workers and then by age, by which a parent goes
before its children; an imagined eviction may count a node twice; a full hit does not refresh the node that it
hits; a leaf behind a fresh split is one level deeper than it stands.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TypeAlias

from preble_sgl.core import WorkerId, common_prefix_len
from preble_sgl.global_sched.node import TOKEN_BYTES

KV_TOKENS = 198_516
"""Preble's hard-coded budget of every GPU: Mistral-7B on an A6000."""


@dataclass(slots=True, eq=False)
class HistoryNode:
    """One edge. `allocation`: the workers its requests are sent to; `cached`: those believed to have it.

    `refs`: unfinished requests per worker. `last_access`: a tick, in place of Preble's clock.
    """

    key: bytes
    parent: "HistoryNode | None"
    end_len: int
    depth: int
    last_access: int
    children: dict[bytes, "HistoryNode"] = field(default_factory=dict)
    refs: dict[WorkerId, int] = field(default_factory=dict)
    cached: set[WorkerId] = field(default_factory=set)
    allocation: set[WorkerId] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        """Tokens of this edge."""
        return len(self.key) // TOKEN_BYTES

    @property
    def start_len(self) -> int:
        """Tokens in front of it."""
        return self.end_len - self.num_tokens

    @property
    def is_large(self) -> bool:
        """Say whether it is longer than all in front of it."""
        return self.num_tokens > self.start_len

    def ancestors(self) -> Iterator["HistoryNode"]:
        """Yield the node and all above it, the root last."""
        node: HistoryNode | None = self
        while node is not None:
            yield node
            node = node.parent


Entry: TypeAlias = tuple[tuple[int, ...], int, int, HistoryNode]
"""References on all workers, last access, a unique number so that nodes are never compared, the node."""


class HistoryTree:
    """All prompts ever placed. Owns the nodes; their allocations belong to the policy."""

    def __init__(self) -> None:
        self._roots: dict[str, HistoryNode] = {}
        self._ticks = count()
        self._cached_tokens: dict[WorkerId, int] = {}
        self.nodes: list[HistoryNode] = []

    def insert(self, namespace: str, packed: bytes) -> tuple[HistoryNode, HistoryNode | None]:
        """Return the leaf of a prompt, and the node that was split for it, which keeps the lower part.

        Namespaces, which Preble does not have, get a tree each. O(prompt + path).
        """
        split: HistoryNode | None = None
        node, depth = self._root(namespace), 0
        while True:
            node.last_access = next(self._ticks)
            child = node.children.get(packed[:TOKEN_BYTES])
            if child is None:
                return self._new_node(packed, node, depth + 1), split
            common = common_prefix_len(child.key, packed) * TOKEN_BYTES
            packed, depth = packed[common:], depth + 1
            if common < len(child.key):
                split, child, depth = child, self._split(child, common), depth + 1
            if not packed:
                return child, split
            node = child

    def begin(self, leaf: HistoryNode, worker_id: WorkerId) -> None:
        """Count a request on its path and believe the path cached on its worker. O(path)."""
        for node in leaf.ancestors():
            node.refs[worker_id] = node.refs.get(worker_id, 0) + 1
            if worker_id not in node.cached:
                node.cached.add(worker_id)
                self._cached_tokens[worker_id] = self._cached_tokens.get(worker_id, 0) + node.num_tokens

    def end(self, leaf: HistoryNode, worker_id: WorkerId) -> None:
        """Take a request off its path, which it refreshes; the root counts on. O(path)."""
        for node in reversed(list(leaf.ancestors())):
            node.last_access = next(self._ticks)
            if node.parent is not None:
                node.refs[worker_id] -= 1

    def would_evict(
        self, need_len: int, worker_id: WorkerId, worker_ids: Sequence[WorkerId]
    ) -> list[HistoryNode]:
        """Return what evicting `need_len` tokens on a worker would hit. O(nodes · workers)."""
        heap = self._heap((node for node in self.nodes if worker_id in node.cached), worker_ids)
        victims: dict[HistoryNode, None] = {}
        while heap and need_len > 0:
            node = heappop(heap)[3]
            if node.parent is None:
                break
            need_len -= node.num_tokens
            victims[node] = None
            siblings = [other for other in node.parent.children.values() if other not in victims]
            if not any(worker_id in sibling.cached for sibling in siblings):
                heappush(heap, _entry(node.parent, worker_ids, next(self._ticks)))
        return list(victims)

    def evict(self, worker_id: WorkerId, worker_ids: Sequence[WorkerId]) -> None:
        """Simulate LRU down to KV_TOKENS on a worker. O(nodes · workers) if it is full, else O(1)."""
        need_len = self._cached_tokens[worker_id] - KV_TOKENS
        if need_len <= 0:
            return
        idle = (node for node in self.nodes if worker_id in node.cached and not node.refs[worker_id])
        heap = self._heap(idle, worker_ids)
        while heap and need_len > 0:
            node = heappop(heap)[3]
            if node.parent is None:
                break
            if node.refs[worker_id] or worker_id not in node.cached:
                continue
            node.cached.discard(worker_id)
            self._cached_tokens[worker_id] -= node.num_tokens
            need_len -= node.num_tokens
            if not any(worker_id in sibling.cached for sibling in node.parent.children.values()):
                heappush(heap, _entry(node.parent, worker_ids, next(self._ticks)))

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Forget a worker that is gone, which Preble's GPUs never are. O(nodes)."""
        for node in self.nodes:
            node.refs.pop(worker_id, None)
            node.cached.discard(worker_id)
            node.allocation.discard(worker_id)
        self._cached_tokens.pop(worker_id, None)

    def _root(self, namespace: str) -> HistoryNode:
        if namespace not in self._roots:
            self._roots[namespace] = self._new_node(b"", None, depth=0)
        return self._roots[namespace]

    def _heap(self, nodes: Iterator[HistoryNode], worker_ids: Sequence[WorkerId]) -> list[Entry]:
        heap = [_entry(node, worker_ids, next(self._ticks)) for node in nodes]
        heapify(heap)
        return heap

    def _new_node(self, key: bytes, parent: HistoryNode | None, depth: int) -> HistoryNode:
        start_len = parent.end_len if parent is not None else 0
        node = HistoryNode(key, parent, start_len + len(key) // TOKEN_BYTES, depth, next(self._ticks))
        if parent is not None:
            parent.children[key[:TOKEN_BYTES]] = node
        self.nodes.append(node)
        return node

    def _split(self, lower: HistoryNode, at: int) -> HistoryNode:
        """Cut an edge after `at` bytes; the object keeps the lower part. Returns the upper."""
        upper = self._new_node(lower.key[:at], lower.parent, lower.depth)
        lower.key = lower.key[at:]
        lower.parent, lower.depth = upper, upper.depth + 1
        upper.children[lower.key[:TOKEN_BYTES]] = lower
        upper.refs, upper.cached = dict(lower.refs), set(lower.cached)
        upper.allocation = set(lower.allocation)
        return upper


def _entry(node: HistoryNode, worker_ids: Sequence[WorkerId], number: int) -> Entry:
    return tuple(node.refs.get(worker_id, 0) for worker_id in worker_ids), node.last_access, number, node
