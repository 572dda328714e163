"""The KV cache of one runtime: a pool of tokens, and a radix tree over what is cached in it.

    pool = free + cached (in the tree: locked or evictable) + private (held by one running request)

A running request locks the path of its prompt in the tree and holds the tokens it has computed beyond that.
They move into the tree with `adopt`, when a chunk of its prompt is computed and when it ends; what another
request has put there meanwhile is freed, for it is there twice. As in SGLang only whole pages enter the tree,
nodes are split at page boundaries, and leaves that nobody locks are evicted as a whole, the least recently
used first. Complexities: n tokens (at memcmp speed), d nodes on the way.
"""

import heapq
from dataclasses import dataclass, field
from itertools import count

from preble_sgl.core import CacheCleared, CacheEvent, common_prefix_len
from preble_sgl.sim.cache_news import CacheNews, PageHashes, root_pages

TOKEN_BYTES = 4


@dataclass(slots=True, eq=False)
class KvNode:
    """One edge of the tree. `locks`: running requests and pins whose path goes through it.

    `last_used`: tick of the last use of this node or of one evicted below it. When an edge is split, the
    object keeps the lower part, so a reference stays one to the same prefix. `pages`: hashes, if published.
    """

    key: bytes
    parent: "KvNode | None"
    end_len: int
    last_used: int = 0
    locks: int = 0
    listed: bool = False
    gone: bool = False
    children: "dict[bytes, KvNode]" = field(default_factory=dict)
    pages: PageHashes | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens on this edge."""
        return len(self.key) // TOKEN_BYTES


class KvCache:
    """The pool and the tree of one runtime. `news` collects its events; None if they are not published."""

    def __init__(self, capacity: int, page_size: int = 1, *, publish: bool = False) -> None:
        self.page_size = page_size
        self.capacity = capacity - capacity % page_size
        self.num_cached = 0
        self.num_locked = 0
        self.num_private = 0
        self.num_evicted = 0
        self.news = CacheNews(page_size) if publish else None
        self._roots: dict[str, KvNode] = {}
        self._ticks = count(1)
        self._numbers = count()
        self._leaves: list[tuple[int, int, KvNode]] = []
        self._page_bytes = page_size * TOKEN_BYTES

    @property
    def num_free(self) -> int:
        """Tokens of the pool that nothing uses."""
        return self.capacity - self.num_cached - self.num_private

    @property
    def num_evictable(self) -> int:
        """Cached tokens that no request and no pin locks."""
        return self.num_cached - self.num_locked

    @property
    def num_available(self) -> int:
        """Tokens that can be allocated, by eviction if need be."""
        return self.capacity - self.num_private - self.num_locked

    @property
    def num_locks(self) -> int:
        """How many requests and pins lock a prefix."""
        return sum(child.locks for root in self._roots.values() for child in root.children.values())

    def root(self, namespace: str) -> KvNode:
        """Return the node of the empty prefix of a namespace; it is never evicted."""
        node = self._roots.get(namespace)
        if node is None:
            pages = root_pages(namespace) if self.news else None
            node = self._roots[namespace] = KvNode(b"", None, 0, pages=pages)
        return node

    def match(self, start: KvNode, packed: bytes, limit_len: int) -> KvNode:
        """Follow `packed` down from `start`, which lies on it, for at most `limit_len` tokens; uses it.

        Returns the node that ends the longest cached prefix in whole pages, splitting an edge that goes on.
        `start` may have been evicted since: then the search begins at its nearest living ancestor. O(n + d).
        """
        node, page_bytes = start, self._page_bytes
        while node.gone:
            assert node.parent is not None
            node = node.parent
        end = (limit_len - limit_len % self.page_size) * TOKEN_BYTES
        offset = node.end_len * TOKEN_BYTES
        while offset < end and node.children:
            child = node.children.get(packed[offset : offset + page_bytes])
            if child is None:
                break
            stop = offset + len(child.key)
            if stop > end or not packed.startswith(child.key, offset):
                common = min(common_prefix_len(child.key, packed, offset) * TOKEN_BYTES, end - offset)
                node = self._split(child, common - common % page_bytes)
                break
            node, offset = child, stop
        if node.parent is not None:
            node.last_used = next(self._ticks)
        return node

    def lock(self, node: KvNode) -> None:
        """Keep a prefix from being evicted. O(d)."""
        while node.parent is not None:
            if not node.locks:
                self.num_locked += len(node.key) // TOKEN_BYTES
            node.locks += 1
            node = node.parent

    def unlock(self, node: KvNode) -> None:
        """Take back one lock. O(d)."""
        while node.parent is not None:
            node.locks -= 1
            if not node.locks:
                self.num_locked -= len(node.key) // TOKEN_BYTES
                if not node.children:
                    self._list(node)
            node = node.parent

    def allocate(self, num_tokens: int) -> bool:
        """Hold tokens for a request, evicting others; say no, and change nothing, if there are too few."""
        if num_tokens > self.num_available:
            return False
        if num_tokens > self.num_free:
            self._evict(num_tokens - self.num_free)
        self.num_private += num_tokens
        return True

    def free(self, num_tokens: int) -> None:
        """Give back what a request held."""
        self.num_private -= num_tokens

    def adopt(self, start: KvNode, packed: bytes) -> KvNode:
        """Cache the prefix `packed`, in whole pages, whose part behind `start` a request holds. O(n + d).

        Returns its end. What was cached already is freed.
        """
        assert len(packed) % self._page_bytes == 0
        node, offset = start, start.end_len * TOKEN_BYTES
        self.num_private -= (len(packed) - offset) // TOKEN_BYTES
        while offset < len(packed):
            child = node.children.get(packed[offset : offset + self._page_bytes])
            if child is None:
                node = self._append(node, packed[offset:])
                break
            if packed.startswith(child.key, offset):
                node, offset = child, offset + len(child.key)
            else:
                common = common_prefix_len(child.key, packed, offset) * TOKEN_BYTES
                common -= common % self._page_bytes
                node, offset = self._split(child, common), offset + common
        if node.parent is not None:
            node.last_used = next(self._ticks)
        return node

    def clear(self) -> None:
        """Forget everything. Nothing may be locked or held."""
        assert not self.num_locked + self.num_private, "a cache in use cannot be cleared"
        for node in self._nodes():
            node.gone = True
        for root in self._roots.values():
            root.children.clear()
        self._leaves.clear()
        self.num_cached = 0
        if self.news:
            self.news.add(CacheCleared())

    def take_events(self) -> list[CacheEvent]:
        """Return what changed since the last time; nothing unless events are published."""
        return self.news.take() if self.news else []

    def check_invariants(self) -> None:
        """Assert that the sums are the sums over the nodes and that nothing is lost. O(nodes)."""
        nodes = self._nodes()
        assert self.num_cached == sum(node.num_tokens for node in nodes)
        assert self.num_locked == sum(node.num_tokens for node in nodes if node.locks)
        assert self.num_private >= 0
        assert self.num_free >= 0, "more tokens are used than there are"
        for node in nodes:
            assert node.parent is not None
            assert not node.gone
            assert node.end_len == node.parent.end_len + node.num_tokens
            assert node.parent.children[node.key[: self._page_bytes]] is node
            assert node.locks >= sum(child.locks for child in node.children.values())
            assert node.num_tokens
            assert node.num_tokens % self.page_size == 0
            assert node.listed or node.locks or node.children, "an evictable leaf is listed"

    def _nodes(self) -> list[KvNode]:
        nodes: list[KvNode] = []
        stack = list(self._roots.values())
        while stack:
            below = stack.pop().children.values()
            nodes.extend(below)
            stack.extend(below)
        return nodes

    def _append(self, parent: KvNode, key: bytes) -> KvNode:
        num_tokens = len(key) // TOKEN_BYTES
        node = KvNode(key, parent, parent.end_len + num_tokens, next(self._ticks))
        parent.children[key[: self._page_bytes]] = node
        self.num_cached += num_tokens
        self._list(node)
        if self.news:
            assert parent.pages is not None
            node.pages = self.news.stored(parent.pages, key)
        return node

    def _split(self, lower: KvNode, at: int) -> KvNode:
        """Cut an edge after `at` bytes and return its upper part; if that is nothing, the edge's start."""
        parent = lower.parent
        assert parent is not None
        if not at:
            return parent
        upper = KvNode(
            lower.key[:at], parent, parent.end_len + at // TOKEN_BYTES, lower.last_used, lower.locks
        )
        parent.children[upper.key[: self._page_bytes]] = upper
        lower.key = lower.key[at:]
        lower.parent = upper
        upper.children[lower.key[: self._page_bytes]] = lower
        if self.news:
            assert parent.pages is not None
            assert lower.pages is not None
            upper.pages, lower.pages = self.news.split(parent.pages, upper.key, lower.pages)
        return upper

    def _list(self, node: KvNode) -> None:
        """Put a leaf into the order of eviction, unless it has an entry."""
        if not node.listed:
            node.listed = True
            heapq.heappush(self._leaves, (node.last_used, next(self._numbers), node))

    def _evict(self, num_tokens: int) -> None:
        """Evict leaves until so many tokens are freed; there must be enough."""
        goal = self.num_cached - num_tokens
        while self.num_cached > goal:
            tick, _, node = heapq.heappop(self._leaves)
            node.listed = False
            if node.gone or node.locks or node.children:
                continue
            if node.last_used > tick:
                self._list(node)
            else:
                self._remove(node)

    def _remove(self, node: KvNode) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self._page_bytes]]
        node.gone = True
        self.num_cached -= node.num_tokens
        self.num_evicted += node.num_tokens
        parent.last_used = max(parent.last_used, node.last_used)
        if self.news:
            assert node.pages is not None
            self.news.removed(node.pages)
        if parent.parent is not None and not parent.children and not parent.locks:
            self._list(parent)
