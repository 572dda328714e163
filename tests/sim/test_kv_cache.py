"""The KV cache against a dict of pages: what is cached, what is evicted in which order, and what is told."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest

from preble_sgl.core import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from preble_sgl.sim.kv_cache import KvCache, KvNode
from tests.global_sched.fake_cache import hashes
from tests.sim.engines import pack

Tokens = Sequence[int]


# The model


@dataclass
class Page:
    """One cached page. `ends_node`: an edge of the tree ends with it."""

    parent: int | None
    last_used: int
    ends_node: bool = False
    locks: int = 0


@dataclass
class Pages:
    """What a cache should hold: pages by hash. Everything is looked up naively."""

    page_size: int
    pages: dict[int, Page] = field(default_factory=dict)
    tick: int = 0

    def match(self, tokens: Tokens, namespace: str) -> list[int]:
        """Return the cached pages that a prompt begins with, which are used now."""
        found: list[int] = []
        for block_hash in hashes(tokens, self.page_size, namespace):
            if block_hash not in self.pages:
                break
            found.append(block_hash)
        self._use(found)
        return found

    def adopt(self, tokens: Tokens, namespace: str) -> list[int]:
        """Cache the pages of a prompt; return them."""
        found = hashes(tokens, self.page_size, namespace)
        known = self.match(tokens, namespace)
        for before, block_hash in zip([None, *found], found, strict=False):
            if block_hash not in self.pages:
                self.pages[block_hash] = Page(before, self.tick)
        self._use(found)
        assert found[: len(known)] == known
        return found

    def evict_to(self, num_tokens: int) -> None:
        """Evict leaves as a whole, the least recently used first, until no more tokens are cached."""
        while len(self.pages) * self.page_size > num_tokens:
            parents = {page.parent for page in self.pages.values()}
            leaves = [
                (page.last_used, block_hash)
                for block_hash, page in self.pages.items()
                if block_hash not in parents and not page.locks
            ]
            _, gone = min(leaves)
            while True:
                above = self.pages.pop(gone).parent
                if above is None or self.pages[above].ends_node:
                    break
                gone = above

    def lock(self, found: Sequence[int], by: int) -> None:
        for block_hash in found:
            self.pages[block_hash].locks += by

    @property
    def num_locked(self) -> int:
        return sum(page.locks > 0 for page in self.pages.values()) * self.page_size

    def _use(self, found: Sequence[int]) -> None:
        self.tick += 1
        for block_hash in found:
            self.pages[block_hash].last_used = self.tick
        if found:
            self.pages[found[-1]].ends_node = True


# Random lives


@dataclass
class Held:
    """A request: what it locks, how much of its tokens it has computed, and how much it holds for them."""

    tokens: Tokens
    namespace: str
    node: KvNode
    locked: list[int]
    computed_len: int
    held_len: int


class Life:
    """A cache and its model under the same random actions, and what a listener makes of its events."""

    def __init__(self, page_size: int, seed: int, capacity: int) -> None:
        self.rng = random.Random(f"{page_size} {seed}")
        self.page_size = page_size
        self.cache = KvCache(capacity, page_size, publish=True)
        self.model = Pages(page_size)
        self.held: list[Held] = []
        self.waiting: list[tuple[Tokens, str, KvNode]] = []
        self.told: set[int] = set()

    def tokens(self) -> list[int]:
        trunk = self.rng.randrange(3) * 1000
        tokens = list(range(trunk, trunk + self.rng.choice([0, 1, 3, 4, 8, 17, 32, 48])))
        return tokens + self.rng.choices([1, 2], k=self.rng.randint(1, 3 * self.page_size + 4))

    def step(self) -> None:
        actions = [self.begin, self.begin, self.compute, self.compute, self.end, self.wait, self.look_again]
        self.rng.choice(actions)()
        if self.rng.random() < 0.003:
            self.clear()
        self.check()

    def begin(self) -> None:
        """A request locks what is cached of its prompt and takes memory for the rest, if there is enough."""
        if self.waiting and self.rng.random() < 0.5:
            tokens, namespace, start = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        else:
            tokens, namespace = self.tokens(), self.rng.choice(["", "salt"])
            start = self.cache.root(namespace)
        node, found = self.match(tokens, namespace, start)
        self.cache.lock(node)
        self.model.lock(found, 1)
        missing_len = len(tokens) - node.end_len
        held_len = -(-missing_len // self.page_size) * self.page_size
        fits = held_len <= self.cache.num_available
        assert self.cache.allocate(held_len) == fits
        if fits:
            self.held.append(Held(tokens, namespace, node, found, node.end_len, held_len))
            self.model.evict_to(self.cache.capacity - self.cache.num_private)
        else:
            self.cache.unlock(node)
            self.model.lock(found, -1)

    def match(self, tokens: Tokens, namespace: str, start: KvNode) -> tuple[KvNode, list[int]]:
        limit_len = self.rng.choice([len(tokens), len(tokens) - 1])
        node = self.cache.match(start, pack(tokens), limit_len)
        found = self.model.match(tokens[:limit_len], namespace)
        assert node.end_len == len(found) * self.page_size
        return node, found

    def compute(self) -> None:
        """A request computes some of its tokens; the whole pages of them are cached."""
        if self.held:
            one = self.rng.choice(self.held)
            one.computed_len = self.rng.randint(one.computed_len, len(one.tokens))
            whole_len = one.computed_len - one.computed_len % self.page_size
            if whole_len > one.node.end_len:
                one.held_len -= whole_len - one.node.end_len
                node = self.cache.adopt(one.node, pack(one.tokens[:whole_len]))
                self.cache.lock(node)
                self.cache.unlock(one.node)
                self.model.lock(one.locked, -1)
                one.node, one.locked = node, self.model.adopt(one.tokens[:whole_len], one.namespace)
                self.model.lock(one.locked, 1)
                assert node.end_len == whole_len

    def end(self) -> None:
        if self.held:
            one = self.held.pop(self.rng.randrange(len(self.held)))
            self.cache.free(one.held_len)
            self.cache.unlock(one.node)
            self.model.lock(one.locked, -1)

    def wait(self) -> None:
        """A request looks at the cache and locks nothing."""
        tokens, namespace = self.tokens(), self.rng.choice(["", "salt"])
        node, _ = self.match([*tokens, 9], namespace, self.cache.root(namespace))
        self.waiting.append(([*tokens, 9], namespace, node))

    def look_again(self) -> None:
        """One that waits goes on from what it found before, of which much may be evicted or split since."""
        if self.waiting:
            index = self.rng.randrange(len(self.waiting))
            tokens, namespace, start = self.waiting[index]
            node, _ = self.match(tokens, namespace, start)
            self.waiting[index] = tokens, namespace, node

    def clear(self) -> None:
        while self.held:
            self.end()
        self.cache.clear()
        self.model.pages.clear()

    def check(self) -> None:
        self.cache.check_invariants()
        assert self.cache.num_cached == len(self.model.pages) * self.page_size
        assert self.cache.num_locked == self.model.num_locked
        assert self.cache.num_private == sum(one.held_len for one in self.held)
        assert self.cache.num_locks == sum(bool(one.locked) for one in self.held)
        if self.rng.random() < 0.5:
            hear(self.told, self.cache.take_events(), self.page_size)
            assert self.told == self.model.pages.keys()


def hear(told: set[int], events: Sequence[CacheEvent], page_size: int) -> None:
    """Apply events to a set of pages, and insist that they can be understood one by one."""
    for event in events:
        match event:
            case BlocksStored():
                assert event.block_size == page_size
                assert event.parent_hash is None or event.parent_hash in told
                assert not told & set(event.block_hashes), "a page is stored once"
                told |= set(event.block_hashes)
            case BlocksRemoved():
                assert set(event.block_hashes) <= told
                told -= set(event.block_hashes)
            case CacheCleared():
                told.clear()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("page_size", "capacity"), [(1, 60), (1, 200), (4, 128), (4, 300), (16, 256), (16, 640)]
)
def test_random_lives_cache_evict_and_tell_what_a_dict_of_pages_does(
    page_size: int, capacity: int, seed: int
) -> None:
    life = Life(page_size, seed, capacity)
    for _ in range(1000):
        life.step()
    assert life.cache.num_evicted > 100


# Stories


def cached(cache: KvCache, tokens: Iterable[int], namespace: str = "") -> KvNode:
    """Cache a prompt as a request does that computes all of it."""
    packed = pack(tokens)
    node = cache.match(cache.root(namespace), packed, len(packed) // 4)
    assert cache.allocate(len(packed) // 4 - node.end_len)
    return cache.adopt(node, packed)


def match_len(cache: KvCache, tokens: Iterable[int], namespace: str = "") -> int:
    packed = pack(tokens)
    return cache.match(cache.root(namespace), packed, len(packed) // 4).end_len


def test_leaves_are_evicted_least_recently_used_first_and_as_a_whole() -> None:
    cache = KvCache(100)
    for first in (0, 100, 200):
        cached(cache, range(first, first + 30))
    match_len(cache, range(30))
    assert cache.allocate(11)  # 10 are free
    assert cache.num_evicted == 30
    assert [match_len(cache, range(first, first + 30)) for first in (0, 100, 200)] == [30, 0, 30]


def test_a_trunk_is_evicted_after_its_last_branch_and_is_as_young_as_that_was() -> None:
    cache = KvCache(100)
    cached(cache, range(20))
    cached(cache, [*range(20), *range(100, 120)])
    cached(cache, range(200, 220))
    cached(cache, [*range(20), *range(300, 320)])
    lens = []
    for _ in range(4):
        assert cache.allocate(cache.num_free + 1)
        cache.free(cache.num_private)
        lens.append(cache.num_cached)
    assert lens == [60, 40, 20, 0]
    assert match_len(cache, range(20)) == 0


def test_what_is_locked_is_not_evicted_and_an_allocation_that_cannot_be_changes_nothing() -> None:
    cache = KvCache(100)
    node = cached(cache, range(30))
    cache.lock(node)
    cached(cache, range(100, 140))
    assert (cache.num_free, cache.num_evictable, cache.num_available) == (30, 40, 70)
    assert not cache.allocate(71)
    assert (cache.num_cached, cache.num_evicted) == (70, 0)
    assert cache.allocate(70)
    assert cache.num_cached == 30
    cache.unlock(node)
    cache.free(70)
    assert cache.allocate(100)
    assert cache.num_cached == 0


def test_what_two_requests_computed_is_there_once_and_the_second_copy_is_freed() -> None:
    cache = KvCache(100)
    assert cache.allocate(60)
    first = cache.adopt(cache.root(""), pack(range(30)))
    second = cache.adopt(cache.root(""), pack(range(30)))
    assert first is second
    assert (cache.num_cached, cache.num_private, cache.num_free) == (30, 0, 70)


def test_a_match_may_end_within_an_edge_and_the_object_stays_the_end_of_the_longer_prefix() -> None:
    cache = KvCache(100, page_size=4)
    whole = cached(cache, range(16))
    upper = cache.match(cache.root(""), pack(range(11)), 11)
    assert (upper.end_len, whole.end_len, whole.parent) == (8, 16, upper)
    assert cache.match(upper, pack(range(16)), 16) is whole


def test_a_part_of_a_page_at_the_end_of_the_pool_is_of_no_use() -> None:
    cache = KvCache(99, page_size=16)
    assert cache.capacity == cache.num_available == 96


@pytest.mark.parametrize("namespace", ["", "salt"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_events_carry_the_hashes_that_sglang_computes(page_size: int, namespace: str) -> None:
    cache = KvCache(1000, page_size, publish=True)
    trunk, branch = list(range(48)), [*range(32), *range(100, 132)]
    cached(cache, trunk, namespace)
    cached(cache, branch, namespace)
    first, second = cache.take_events()
    assert isinstance(first, BlocksStored)
    assert isinstance(second, BlocksStored)
    assert list(first.block_hashes) == hashes(trunk, page_size, namespace)
    assert (first.parent_hash, list(first.token_ids), first.namespace) == (None, trunk, namespace)
    num_shared = 32 // page_size
    assert list(second.block_hashes) == hashes(branch, page_size, namespace)[num_shared:]
    assert second.parent_hash == hashes(trunk, page_size, namespace)[num_shared - 1]
    assert list(second.token_ids) == branch[32:]


def test_what_is_evicted_together_is_told_as_one_removal() -> None:
    cache = KvCache(100, publish=True)
    cached(cache, range(20))
    cached(cache, [*range(10), *range(100, 110)])
    cache.take_events()
    assert cache.allocate(100)
    [event] = cache.take_events()
    assert isinstance(event, BlocksRemoved)
    gone = {*hashes(range(20)), *hashes([*range(10), *range(100, 110)])}
    assert len(event.block_hashes) == len(gone) == 30
    assert set(event.block_hashes) == gone
    cache.free(100)
    cache.clear()
    assert cache.take_events() == [CacheCleared()]
    assert cache.take_events() == []


def test_a_silent_cache_tells_nothing() -> None:
    cache = KvCache(100)
    cached(cache, range(20))
    cache.clear()
    assert cache.take_events() == []
