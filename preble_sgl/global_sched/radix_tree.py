"""The prefix tree over all workers: which worker has, or is about to compute, the KV of which prefix.

Every worker sees the same nodes (see `trie.py`), each with its own `Share`. Whoever has a node has all its
ancestors, so most operations walk up from the end of a prompt (its *tail*) and stop at the first node where
nothing is left to do.

The tree is the state that each runtime will be in once it has prefilled everything placed on it:

- `bind` when a request is placed: locks its prompt and claims the part that nobody has computed;
- `mark_computed` at its first token: the claimed part is cached now;
- `insert` and `unlock` at its end: prompt and output are cached and evictable;
- `release` when it is cancelled before its first token: what only it claimed is forgotten.

A worker is *estimated*, then the tree evicts beyond its capacity as the runtime would (see `eviction.py`); or
*exact*, then its runtime tells what it stores and removes (see `cache_feed.py`), nothing is evicted here, and
what the calls above say is believed until the runtime has spoken after them:

- `store`, `cut` and `give_up`: what the runtime stored; what it kept of a node; what it has no more;
- `settle`: the runtime has told all until now, so what finished requests left and it did not tell is dropped.

A node goes when no worker has it and no request in window H shared it. Nothing here scans the tree except
what follows the loss of a whole cache. In the complexities below, n is the length of the prompt in tokens
(at memcmp speed) and d the number of nodes it passes.
"""

from itertools import count

from preble_sgl.core import RequestId, WorkerId
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched.block_index import BlockIndex
from preble_sgl.global_sched.eviction import EvictionOrder, WorkerCache
from preble_sgl.global_sched.invariants import check_cache
from preble_sgl.global_sched.node import TOKEN_BYTES, Match, Node, Prospect, Share, uncomputed
from preble_sgl.global_sched.trend import QueueingTrend
from preble_sgl.global_sched.trie import Trie


class RadixTree:
    """Prefixes and their holders. Owns every node, share, eviction order and block index."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self.trie = Trie()
        self._indexes = self.trie.indexes
        self._caches: dict[WorkerId, WorkerCache] = {}
        self._page_sizes: dict[WorkerId, int] = {}
        self._ticks = count()

    @property
    def num_nodes(self) -> int:
        """Return how many edges the tree has, over all namespaces."""
        return self.trie.num_nodes

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
        for node in list(self.trie.nodes()):
            node.recent.pop(worker_id, None)
            node.trends.pop(worker_id, None)
            self.trie.prune(node)
        del self._caches[worker_id], self._page_sizes[worker_id]

    def clear(self, worker_id: WorkerId) -> None:
        """Forget all that a worker has, locks and claims included, and estimate it from now on. O(nodes).

        Raises UnknownIdError.
        """
        cache = self.cache(worker_id)
        for node in list(self.trie.nodes()):
            node.shares.pop(worker_id, None)
            self.trie.prune(node)
        cache.used = 0
        cache.order = EvictionOrder(worker_id)
        self._indexes.pop(worker_id, None)

    def cache(self, worker_id: WorkerId) -> WorkerCache:
        """Return the size and use of a worker's cache, for reading only. Raises UnknownIdError."""
        return self._caches[self._known(worker_id)]

    def used_tokens(self, worker_id: WorkerId) -> int:
        """Return the tokens that a worker has or is about to compute. Raises UnknownIdError."""
        return self.cache(worker_id).used

    def free_tokens(self, worker_id: WorkerId) -> int:
        """Return the tokens that fit without eviction; 0 if locked prompts exceed the cache."""
        cache = self.cache(worker_id)
        return max(0, cache.capacity - cache.used)

    def eviction_candidates(self, worker_id: WorkerId, need_len: int) -> list[Node]:
        """Return what a worker would evict, in order, to free `need_len` tokens. Pure. O(answer)."""
        return self.cache(worker_id).order.first(need_len)

    # Reading

    def match(self, namespace: str, packed: bytes) -> Match:
        """Return the longest known prefix of `packed`. Changes nothing. O(n + d + workers)."""
        path, known_len = self.trie.find(namespace, packed)
        return Match(path, known_len, self._match_lens(path, known_len))

    def prospect(self, tail: Node, worker_id: WorkerId, request_id: RequestId) -> Prospect:
        """Look at the part of a bound prompt that is not computed yet, and who claimed it earlier. O(d)."""
        computed_len = tail.end_len
        awaited_len = 0
        leaders: dict[RequestId, None] = {}
        for node, share in uncomputed(tail, worker_id):
            computed_len = node.start_len
            leader = next(iter(share.claims))
            if leader != request_id:
                awaited_len += node.num_tokens
                leaders[leader] = None
        return Prospect(computed_len, awaited_len, tuple(leaders))

    # The life of a request

    def bind(
        self,
        namespace: str,
        packed: bytes,
        worker_id: WorkerId,
        request_id: RequestId,
        behind: Node | None = None,
    ) -> Node:
        """Lock a prompt on a worker and claim what is not computed there. Returns its tail. O(n + d).

        `behind`: a node on its way that is known already. The tail stays valid until `unlock` or `release`,
        whatever is split in between.
        """
        tail = self._hold(namespace, packed, worker_id, behind)
        for _, share in uncomputed(tail, worker_id):
            share.claims[request_id] = None
        if tail.parent is not None:
            tail.shares[worker_id].locks += 1
        self._evict(worker_id)
        return tail

    def mark_computed(self, tail: Node, worker_id: WorkerId) -> None:
        """Record that the KV of a bound prompt exists now. O(nodes that were pending)."""
        for _, share in uncomputed(tail, worker_id):
            share.computed = True
            share.claims.clear()

    def unlock(self, tail: Node, worker_id: WorkerId) -> None:
        """Take back the lock of a computed prompt, so that it may be evicted. O(log nodes)."""
        self._unlock(tail, worker_id)
        self._evict(worker_id)

    def release(self, tail: Node, worker_id: WorkerId, request_id: RequestId) -> None:
        """Unlock a prompt; forget what only this request was going to compute. O(d + log nodes)."""
        for _, share in uncomputed(tail, worker_id):
            del share.claims[request_id]
        self._unlock(tail, worker_id)
        node = tail
        while node.parent is not None and node.shares[worker_id].is_unclaimed:
            parent = node.parent
            self._drop(node, worker_id)
            node = parent
        self._doubt(node, worker_id)
        self._evict(worker_id)

    def insert(self, namespace: str, packed: bytes, worker_id: WorkerId, behind: Node | None = None) -> Node:
        """Record that a worker has the KV of a whole prefix. Returns its tail. O(n + d + log nodes).

        `behind`: a node on its way that is known already. Evicts nothing: the tail must be there to be
        counted. The next `bind` or `unlock` does.
        """
        tail = self._hold(namespace, packed, worker_id, behind)
        self.mark_computed(tail, worker_id)
        self._list(tail, worker_id)
        self._doubt(tail, worker_id)
        return tail

    # Exact workers

    def index(self, worker_id: WorkerId) -> BlockIndex | None:
        """Return what an exact worker's runtime told; None for an estimated worker."""
        return self._indexes.get(worker_id)

    def start_exact(self, worker_id: WorkerId) -> None:
        """Empty a worker's cache, except what unfinished requests use; its runtime will tell. O(nodes)."""
        self._indexes[worker_id] = BlockIndex(worker_id, self._page_sizes[worker_id])
        for node in reversed(list(self.trie.nodes())):
            share = node.shares.get(worker_id)
            if share is not None:
                share.blocks = None
                if share.is_evictable:
                    self._drop(node, worker_id)

    def end_exact(self, worker_id: WorkerId) -> None:
        """Estimate from now on what a worker has, starting from what its runtime told last. O(nodes)."""
        if self._indexes.pop(worker_id, None) is None:
            return
        for node in self.trie.nodes():
            if worker_id in node.shares:
                node.shares[worker_id].blocks = None
        self._evict(worker_id)

    def store(self, namespace: str, behind: tuple[Node, int] | None, key: bytes, worker_id: WorkerId) -> Node:
        """Record what the runtime stored: `key` at the root, or behind a prefix that ends in a node.

        Returns its tail. O(n + d + log nodes), n without what is in front of that node.
        """
        if behind is None:
            start = self.trie.root(namespace)
        else:
            node, prefix_len = behind
            assert node.parent is not None
            start, key = node.parent, node.key[: (prefix_len - node.start_len) * TOKEN_BYTES] + key
        tail = self._share(self.trie.node_at(start, key), worker_id)
        self.mark_computed(tail, worker_id)
        self._list(tail, worker_id)
        return tail

    def cut(self, node: Node, end_len: int) -> None:
        """Let a node begin where a prefix of `end_len` tokens ends inside it. O(its tokens)."""
        self.trie.split(node, (end_len - node.start_len) * TOKEN_BYTES)

    def settle(self, worker_id: WorkerId) -> int:
        """Drop what the runtime has not told of finished requests; return how many tokens. O(doubted)."""
        index = self._indexes[worker_id]
        return sum(self.give_up(tail, worker_id) for tail in index.take_doubts())

    def give_up(self, node: Node, worker_id: WorkerId) -> int:
        """Drop an untold leaf, then its ancestors that became untold leaves; return how many tokens."""
        num_tokens = 0
        while (share := node.shares.get(worker_id)) is not None and share.is_evictable:
            if share.blocks is not None:
                self._trim(node, worker_id)
                break
            num_tokens += node.num_tokens
            parent = node.parent
            assert parent is not None
            self._drop(node, worker_id)
            node = parent
        return num_tokens

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
        self.trie.prune(tail)

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

    def _known(self, worker_id: WorkerId) -> WorkerId:
        if worker_id not in self._caches:
            raise UnknownIdError(f"worker {worker_id} is not up")
        return worker_id

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

    def _hold(self, namespace: str, packed: bytes, worker_id: WorkerId, behind: Node | None) -> Node:
        """Give a worker a share of every node of a prefix, cut to whole pages. Returns its tail."""
        page_bytes = self._page_sizes[self._known(worker_id)] * TOKEN_BYTES
        num_bytes = len(packed) - len(packed) % page_bytes
        if not num_bytes:
            return Node(b"", None, 0, 0)  # less than one page: nothing to remember
        if behind is None or behind.parent is None or behind.end_len * TOKEN_BYTES > num_bytes:
            behind = self.trie.root(namespace)
        rest = packed[behind.end_len * TOKEN_BYTES : num_bytes]
        return self._share(self.trie.node_at(behind, rest), worker_id)

    def _share(self, tail: Node, worker_id: WorkerId) -> Node:
        """Give a worker a share of a node and of all its ancestors; touch the node, and return it. O(d)."""
        cache = self._caches[worker_id]
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
        tail.shares[worker_id].last_used = tick
        return tail

    def _doubt(self, tail: Node, worker_id: WorkerId) -> None:
        """Remember that an exact worker's runtime has yet to confirm a prefix. O(d)."""
        index = self._indexes.get(worker_id)
        if index is None or tail.parent is None:
            return
        if index.has_blocks(tail):
            self._trim(tail, worker_id)
        else:
            index.doubt(tail)

    def _trim(self, leaf: Node, worker_id: WorkerId) -> None:
        """Take from a worker what a leaf has behind its last page: the rest of a page whose end is gone."""
        excess_len = leaf.end_len % self._page_sizes[worker_id]
        if excess_len and leaf.shares[worker_id].is_evictable:
            self.cut(leaf, leaf.end_len - excess_len)
            self._drop(leaf, worker_id)

    def _unlock(self, tail: Node, worker_id: WorkerId) -> None:
        if tail.parent is not None:
            tail.shares[worker_id].locks -= 1
            self._list(tail, worker_id)

    def _list(self, node: Node, worker_id: WorkerId) -> None:
        """Enter a node into the worker's eviction order if it has become evictable."""
        if node.parent is not None:
            self._caches[worker_id].order.add(node, node.shares[worker_id])

    def _evict(self, worker_id: WorkerId) -> None:
        """Evict until a worker's tokens fit, or until everything left is in use.

        An exact worker's runtime tells what it evicts; only doubts beyond a whole cache are not kept here.
        """
        cache = self._caches[worker_id]
        index = self._indexes.get(worker_id)
        if index is not None:
            if index.doubted_len > cache.capacity:
                self.settle(worker_id)
            return
        while cache.used > cache.capacity:
            victim = cache.order.pop()
            if victim is None:
                return
            self._drop(victim, worker_id)

    def _drop(self, node: Node, worker_id: WorkerId) -> None:
        """Take a leaf away from a worker."""
        share = node.shares.pop(worker_id)
        cache = self._caches[worker_id]
        cache.used -= node.num_tokens
        if share.listed:
            cache.order.discard(share)
        parent = node.parent
        assert parent is not None
        if parent.parent is not None:
            above = parent.shares[worker_id]
            above.num_children -= 1
            above.last_used = max(above.last_used, share.last_used)
            self._list(parent, worker_id)
        self.trie.prune(node)

    def check_invariants(self) -> None:
        """Assert that counts, nesting, claims and eviction orders agree with the nodes. O(nodes)."""
        self.trie.check_invariants()
        for worker_id, cache in self._caches.items():
            held = [node for node in self.trie.nodes() if worker_id in node.shares]
            shares = [node.shares[worker_id] for node in held]
            num_tokens = sum(node.num_tokens for node in held)
            index = self._indexes.get(worker_id)
            check_cache(cache, shares, num_tokens, is_exact=index is not None)
            if index is not None:
                index.check_invariants(held)
