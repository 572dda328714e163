"""The prefix tree over all workers: which worker has, or is about to compute, the KV of which prefix.

One radix tree per namespace. Edges are packed int32 token ids (`bytes`), so that following an edge is one
memcmp, whatever its length; children are found by the bytes of their first token. Every worker sees the same
nodes, each with its own `Share`. Whoever has a node has all its ancestors, so most operations walk up from
the end of a prompt (its *tail*) and stop at the first node where nothing is left to do.

The tree is the state that each runtime will be in once it has prefilled everything placed on it:

- `bind` when a request is placed: locks its prompt and claims the part that nobody has computed;
- `mark_computed` at its first token: the claimed part is cached now;
- `insert` and `unlock` at its end: prompt and output are cached and evictable;
- `release` when it is cancelled before its first token: what only it claimed is forgotten.

Beyond a worker's capacity the tree evicts as the runtime would (see `eviction.py`). A node goes when no
worker has it and no request in window H shared it. Nothing here scans the tree except the two operations
that follow the loss of a whole cache. In the complexities below, n is the length of the prompt in tokens (at
memcmp speed) and d the number of nodes it passes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from preble_sgl.core import RequestId, WorkerId
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched.eviction import EvictionOrder
from preble_sgl.global_sched.invariants import check_node, check_order
from preble_sgl.global_sched.node import TOKEN_BYTES, Match, Node, Share
from preble_sgl.global_sched.trend import QueueingTrend


@dataclass(slots=True, eq=False)
class WorkerCache:
    """The size of one worker's KV cache and what is in it, in tokens."""

    capacity: int
    order: EvictionOrder
    used: int = 0


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a bound request will find: tokens computed by then, tokens that others compute first, and who."""

    computed_len: int
    awaited_len: int
    leaders: tuple[RequestId, ...]


class RadixTree:
    """Prefixes and their holders. Owns every node, share and eviction order."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._roots: dict[str, Node] = {}
        self._namespaces: dict[Node, str] = {}
        self._caches: dict[WorkerId, WorkerCache] = {}
        self._page_sizes: dict[WorkerId, int] = {}
        self._ticks = count()
        self.num_nodes = 0

    # Workers

    def add_worker(self, worker_id: WorkerId, *, capacity: int, page_size: int = 1) -> None:
        """Start with an empty cache of `capacity` tokens. Raises InputError for a known id or a bad size."""
        if worker_id in self._caches:
            raise InputError(f"worker {worker_id} is already up; report it down first")
        if capacity < 1 or page_size < 1:
            raise InputError(
                f"worker {worker_id}: kv_tokens={capacity}, page_size={page_size}: must be 1 or more"
            )
        self._caches[worker_id] = WorkerCache(capacity, EvictionOrder(worker_id))
        self._page_sizes[worker_id] = page_size

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Remove a worker and everything known about it. O(nodes). Raises UnknownIdError."""
        self.clear(worker_id)
        for node in list(self._nodes()):
            node.recent.pop(worker_id, None)
            node.trends.pop(worker_id, None)
            self._prune(node)
        del self._caches[worker_id], self._page_sizes[worker_id]

    def clear(self, worker_id: WorkerId) -> None:
        """Forget all that a worker has, locks and claims included. O(nodes). Raises UnknownIdError."""
        cache = self._cache(worker_id)
        for node in list(self._nodes()):
            node.shares.pop(worker_id, None)
            self._prune(node)
        cache.used = 0
        cache.order = EvictionOrder(worker_id)

    def used_tokens(self, worker_id: WorkerId) -> int:
        """Return the tokens that a worker has or is about to compute. Raises UnknownIdError."""
        return self._cache(worker_id).used

    def free_tokens(self, worker_id: WorkerId) -> int:
        """Return the tokens that fit without eviction; 0 if locked prompts exceed the cache."""
        cache = self._cache(worker_id)
        return max(0, cache.capacity - cache.used)

    def eviction_candidates(self, worker_id: WorkerId, need_len: int) -> list[Node]:
        """Return what a worker would evict, in order, to free `need_len` tokens. Pure. O(answer)."""
        return self._cache(worker_id).order.first(need_len)

    # Reading

    def match(self, namespace: str, packed: bytes) -> Match:
        """Return the longest known prefix of `packed`. Changes nothing. O(n + d + workers)."""
        path: list[Node] = []
        offset = 0
        node = self._roots.get(namespace)
        while node is not None:
            node = node.children.get(packed[offset : offset + TOKEN_BYTES])
            if node is not None:
                path.append(node)
                if packed.startswith(node.key, offset):
                    offset += len(node.key)
                else:
                    offset += _common_bytes(node.key, packed, offset)
                    break
        known_len = offset // TOKEN_BYTES
        return Match(path, known_len, self._match_lens(path, known_len))

    def prospect(self, tail: Node, worker_id: WorkerId, request_id: RequestId) -> Prospect:
        """Look at the part of a bound prompt that is not computed yet, and who claimed it earlier. O(d)."""
        computed_len = tail.end_len
        awaited_len = 0
        leaders: dict[RequestId, None] = {}
        for node, share in _uncomputed(tail, worker_id):
            computed_len = node.start_len
            leader = next(iter(share.claims))
            if leader != request_id:
                awaited_len += node.num_tokens
                leaders[leader] = None
        return Prospect(computed_len, awaited_len, tuple(leaders))

    # The life of a request

    def bind(self, namespace: str, packed: bytes, worker_id: WorkerId, request_id: RequestId) -> Node:
        """Lock a prompt on a worker and claim what is not computed there. Returns its tail. O(n + d).

        The tail stays valid until `unlock` or `release`, whatever is split in between.
        """
        tail = self._hold(namespace, packed, worker_id)
        for _, share in _uncomputed(tail, worker_id):
            share.claims[request_id] = None
        if tail.parent is not None:
            tail.shares[worker_id].locks += 1
        self._evict(worker_id)
        return tail

    def mark_computed(self, tail: Node, worker_id: WorkerId) -> None:
        """Record that the KV of a bound prompt exists now. O(nodes that were pending)."""
        for _, share in _uncomputed(tail, worker_id):
            share.computed = True
            share.claims.clear()

    def unlock(self, tail: Node, worker_id: WorkerId) -> None:
        """Take back the lock of a computed prompt, so that it may be evicted. O(log nodes)."""
        self._unlock(tail, worker_id)
        self._evict(worker_id)

    def release(self, tail: Node, worker_id: WorkerId, request_id: RequestId) -> None:
        """Unlock a prompt; forget what only this request was going to compute. O(d + log nodes)."""
        for _, share in _uncomputed(tail, worker_id):
            del share.claims[request_id]
        self._unlock(tail, worker_id)
        node = tail
        while node.parent is not None and _is_unclaimed(node.shares[worker_id]):
            parent = node.parent
            self._drop(node, worker_id)
            node = parent
        self._evict(worker_id)

    def insert(self, namespace: str, packed: bytes, worker_id: WorkerId) -> Node:
        """Record that a worker has the KV of a whole prefix. Returns its tail. O(n + d + log nodes).

        Evicts nothing: the tail must be there to be counted. The next `bind` or `unlock` does.
        """
        tail = self._hold(namespace, packed, worker_id)
        self.mark_computed(tail, worker_id)
        self._list(tail, worker_id)
        return tail

    # Window statistics, kept by whoever owns the window

    def count_recent(self, tail: Node, worker_id: WorkerId, above: Node | None = None) -> None:
        """Count one request on every node from `tail` up to, not including, `above`. O(d)."""
        node = tail
        while node.parent is not None and node is not above:
            node.recent[worker_id] = node.recent.get(worker_id, 0) + 1
            node = node.parent

    def discount_recent(self, tail: Node, worker_id: WorkerId) -> None:
        """Take back one count from every node of a path; nodes that nobody needs any more go. O(d)."""
        node: Node | None = tail
        while node is not None and node.parent is not None:
            node.recent[worker_id] -= 1
            if not node.recent[worker_id]:
                del node.recent[worker_id]
            node = node.parent
        self._prune(tail)

    def add_queueing(self, tail: Node, worker_id: WorkerId, queueing_s: float, now: float) -> None:
        """Count a queueing time for the key portion of a prompt. O(d)."""
        node = tail
        while node.parent is not None:
            if node.is_key_portion:
                trend = node.trends.setdefault(worker_id, QueueingTrend(self._window_s))
                trend.add(queueing_s, now)
                return
            node = node.parent

    # Inside

    def _cache(self, worker_id: WorkerId) -> WorkerCache:
        try:
            return self._caches[worker_id]
        except KeyError:
            raise UnknownIdError(f"worker {worker_id} is not up") from None

    def _match_lens(self, path: list[Node], known_len: int) -> dict[WorkerId, int]:
        """Return the matched tokens of each worker. Going up the path, the set of its holders only grows."""
        lens: dict[WorkerId, int] = {}
        for node in reversed(path):
            if len(node.shares) == len(lens):
                continue
            matched_len = min(node.end_len, known_len)
            for worker_id in node.shares:
                if worker_id not in lens:
                    lens[worker_id] = matched_len - matched_len % self._page_sizes[worker_id]
        return lens

    def _hold(self, namespace: str, packed: bytes, worker_id: WorkerId) -> Node:
        """Give a worker a share of every node of a prefix, cut to whole pages; touch the tail."""
        cache = self._cache(worker_id)
        page_bytes = self._page_sizes[worker_id] * TOKEN_BYTES
        tail = self._path(namespace, packed[: len(packed) - len(packed) % page_bytes])
        num_children = 0
        tick = next(self._ticks)
        node = tail
        while node.parent is not None:
            share = node.shares.get(worker_id)
            if share is not None:
                share.num_children += num_children
                break
            node.shares[worker_id] = Share(tick, num_children=num_children)
            cache.used += node.num_tokens
            num_children = 1
            node = node.parent
        if tail.parent is not None:
            tail.shares[worker_id].last_used = tick
        return tail

    def _path(self, namespace: str, packed: bytes) -> Node:
        """Return the node that ends where `packed` ends, creating and splitting as needed."""
        if not packed:
            return Node(b"", None, 0, 0)  # less than one page: nothing to remember
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = Node(b"", None, 0, 0)
            self._namespaces[node] = namespace
        offset = 0
        while offset < len(packed):
            child = node.children.get(packed[offset : offset + TOKEN_BYTES])
            if child is None:
                return self._append(node, packed[offset:])
            if packed.startswith(child.key, offset):
                offset += len(child.key)
            else:
                common = _common_bytes(child.key, packed, offset)
                child = self._split(child, common)
                offset += common
            node = child
        return node

    def _append(self, parent: Node, key: bytes) -> Node:
        num_tokens = len(key) // TOKEN_BYTES
        node = Node(key, parent, parent.end_len + num_tokens, num_tokens)
        parent.children[key[:TOKEN_BYTES]] = node
        self.num_nodes += 1
        return node

    def _split(self, lower: Node, at: int) -> Node:
        """Cut an edge after `at` bytes. The existing object keeps the lower part; returns the upper."""
        parent = lower.parent
        assert parent is not None
        upper = self._append(parent, lower.key[:at])
        upper.children[lower.key[at : at + TOKEN_BYTES]] = lower
        upper.recent = dict(lower.recent)
        for worker_id, share in lower.shares.items():
            upper.shares[worker_id] = Share(
                share.last_used, share.computed, num_children=1, claims=dict(share.claims)
            )
        lower.key = lower.key[at:]
        lower.num_tokens -= upper.num_tokens
        lower.parent = upper
        if not lower.is_key_portion:
            upper.trends, lower.trends = lower.trends, {}
        return upper

    def _unlock(self, tail: Node, worker_id: WorkerId) -> None:
        if tail.parent is not None:
            tail.shares[worker_id].locks -= 1
            self._list(tail, worker_id)

    def _list(self, node: Node, worker_id: WorkerId) -> None:
        """Enter a node into the worker's eviction order if it has become evictable."""
        if node.parent is not None:
            self._caches[worker_id].order.add(node, node.shares[worker_id])

    def _evict(self, worker_id: WorkerId) -> None:
        """Evict until the worker's tokens fit, or until everything left is in use."""
        cache = self._caches[worker_id]
        while cache.used > cache.capacity:
            victim = cache.order.pop()
            if victim is None:
                return
            self._drop(victim, worker_id)

    def _drop(self, node: Node, worker_id: WorkerId) -> None:
        """Take a leaf away from a worker."""
        share = node.shares.pop(worker_id)
        self._caches[worker_id].used -= node.num_tokens
        parent = node.parent
        assert parent is not None
        if parent.parent is not None:
            above = parent.shares[worker_id]
            above.num_children -= 1
            above.last_used = max(above.last_used, share.last_used)
            self._list(parent, worker_id)
        self._prune(node)

    def _prune(self, node: Node) -> None:
        """Delete a node that nobody needs, and then its ancestors."""
        while node.parent is not None and not (node.shares or node.recent or node.children):
            del node.parent.children[node.key[:TOKEN_BYTES]]
            self.num_nodes -= 1
            node = node.parent
        if node.parent is None and not node.children and node in self._namespaces:
            del self._roots[self._namespaces.pop(node)]

    def _nodes(self) -> Iterator[Node]:
        """Yield every node, parents first. Roots are not nodes: nobody holds them."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_invariants(self) -> None:
        """Assert that counts, nesting, claims and eviction orders agree with the nodes. O(nodes)."""
        nodes = list(self._nodes())
        assert self.num_nodes == len(nodes)
        assert {node: name for name, node in self._roots.items()} == self._namespaces
        assert all(root.children for root in self._namespaces), "an empty namespace is forgotten"
        for node in nodes:
            check_node(node)
        for worker_id, cache in self._caches.items():
            held = [node for node in nodes if worker_id in node.shares]
            assert cache.used == sum(node.num_tokens for node in held)
            check_order(cache.order, [node.shares[worker_id] for node in held])
            full = cache.used > cache.capacity
            assert not full or not any(node.shares[worker_id].is_evictable for node in held)


def _common_bytes(key: bytes, packed: bytes, offset: int) -> int:
    """Return how many leading bytes `key` shares with `packed[offset:]`, in whole tokens, by bisection."""
    low, high = TOKEN_BYTES, min(len(key), len(packed) - offset)
    while low < high:
        middle = (low + high + TOKEN_BYTES) // (2 * TOKEN_BYTES) * TOKEN_BYTES
        if key[low:middle] == packed[offset + low : offset + middle]:
            low = middle
        else:
            high = middle - TOKEN_BYTES
    return low


def _uncomputed(tail: Node, worker_id: WorkerId) -> Iterator[tuple[Node, Share]]:
    """Yield, going up, the end of a prompt whose KV a worker has yet to compute."""
    node = tail
    while node.parent is not None:
        share = node.shares[worker_id]
        if share.computed:
            return
        yield node, share
        node = node.parent


def _is_unclaimed(share: Share) -> bool:
    return not share.computed and not share.claims
