"""A naive model of one runtime's KV cache, a dict of pages, which tells of its changes as SGLang does."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from preble_sgl.core import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    CacheEvent,
    block_hashes,
    token_ids,
)

Tokens = Sequence[int]


def hashes(tokens: Tokens, page_size: int = 1, namespace: str = "") -> list[int]:
    """Return SGLang's hash of every whole page of a prompt."""
    digest = hashlib.sha256(b"sglang-cache-salt-v1\0" + namespace.encode()).digest() if namespace else b""
    found = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = tokens[start : start + page_size]
        digest = hashlib.sha256(digest + b"".join(struct.pack("<I", token) for token in page)).digest()
        found.append(struct.unpack(">q", digest[:8])[0])
    return found


@dataclass
class Page:
    """One cached page. `ends_node`: an edge of the runtime's own tree ends with it."""

    parent: int | None
    last_used: int
    locks: int = 0
    num_children: int = 0
    ends_node: bool = False


class FakeCache:
    """Pages by hash. Evicts whole leaf nodes, least recently used first. `batches`: all it has published."""

    def __init__(self, capacity: int, page_size: int = 1) -> None:
        self.num_pages = capacity // page_size
        self.page_size = page_size
        self.batches: list[tuple[CacheEvent, ...]] = []
        self.restart()

    def restart(self) -> None:
        """Begin again as a new process: nothing cached, batches numbered from 0."""
        self.pages: dict[int, Page] = {}
        self.batches.clear()
        self._events: list[CacheEvent] = [CacheCleared()]
        self._tick = 0
        self.publish()

    def match_len(self, tokens: Tokens, namespace: str = "") -> int:
        found = hashes(tokens, self.page_size, namespace)
        num = next((i for i, block_hash in enumerate(found) if block_hash not in self.pages), len(found))
        return num * self.page_size

    def store(self, tokens: Tokens, namespace: str = "") -> None:
        """Cache the whole pages of a prompt; what is there already is used, and told no second time."""
        found = hashes(tokens, self.page_size, namespace)
        num_known = self.match_len(tokens, namespace) // self.page_size
        self._tick += 1
        for block_hash in found[:num_known]:
            self.pages[block_hash].last_used = self._tick
        parent = found[num_known - 1] if num_known else None
        new = found[num_known:]
        for before, block_hash in zip([parent, *new], new, strict=False):
            self.pages[block_hash] = Page(before, self._tick)
            if before is not None:
                self.pages[before].num_children += 1
        if parent is not None and new:
            self.pages[parent].ends_node = True
        if new:
            self.pages[new[-1]].ends_node = True
            start = num_known * self.page_size
            stored = tokens[start : start + len(new) * self.page_size]
            self._tell_stored(new, parent, stored, namespace)

    def lock(self, tokens: Tokens, namespace: str = "") -> list[int]:
        """Keep what is cached of a prompt from being evicted; returns what to unlock."""
        found = hashes(tokens, self.page_size, namespace)[
            : self.match_len(tokens, namespace) // self.page_size
        ]
        if found:
            self.pages[found[-1]].ends_node = True
        for block_hash in found:
            self.pages[block_hash].locks += 1
        return found

    def unlock(self, found: Sequence[int]) -> None:
        for block_hash in found:
            self.pages[block_hash].locks -= 1

    def evict(self, num_pages: int) -> None:
        """Free so many pages, or as many as are not in use."""
        target = len(self.pages) - num_pages
        while len(self.pages) > target:
            leaves = [(p.last_used, h) for h, p in self.pages.items() if not p.num_children and not p.locks]
            if not leaves:
                return
            self._remove_node(min(leaves)[1])

    def fit(self) -> None:
        """Evict what exceeds the capacity."""
        self.evict(len(self.pages) - self.num_pages)

    def clear(self) -> None:
        self.pages.clear()
        self._events.append(CacheCleared())

    @property
    def has_news(self) -> bool:
        """Say whether something happened that was not published yet."""
        return bool(self._events)

    def publish(self) -> None:
        """Put everything that happened since the last time into one batch, if anything did."""
        if self._events:
            self.batches.append(tuple(self._events))
            self._events.clear()

    def _remove_node(self, leaf: int) -> None:
        """Remove a leaf and the pages above it that belong to the same node; tell them top down."""
        gone = [leaf, *self._rest_of_node(leaf)]
        for block_hash in gone:
            page = self.pages.pop(block_hash)
            if page.parent is not None:
                self.pages[page.parent].num_children -= 1
        self._tell_removed(gone[::-1])

    def _rest_of_node(self, end: int) -> Iterator[int]:
        above = self.pages[end].parent
        while above is not None and not self.pages[above].ends_node:
            yield above
            above = self.pages[above].parent

    def _tell_stored(self, new: list[int], parent: int | None, tokens: Tokens, namespace: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksStored) and parent == last.block_hashes[-1]:
            self._events.pop()
            new, tokens = [*last.block_hashes, *new], [*last.token_ids, *tokens]
            parent = last.parent_hash
        self._events.append(
            BlocksStored(
                block_hashes=block_hashes(new),
                parent_hash=parent,
                token_ids=token_ids(tokens),
                block_size=self.page_size,
                namespace=namespace,
            )
        )

    def _tell_removed(self, gone: list[int]) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksRemoved):
            self._events.pop()
            gone = [*last.block_hashes, *gone]
        self._events.append(BlocksRemoved(block_hashes(gone)))
