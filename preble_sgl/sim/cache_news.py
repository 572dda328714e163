"""What a runtime tells of its KV cache: the hashes of pages, as SGLang computes them, and the events.

A page's hash covers the prefix before it: sha256 over the digest of the page before and the page's tokens
as little-endian 32-bit numbers; the first 8 bytes as a signed big-endian number are its name. A namespace's
first page follows a digest of the namespace (SGLang's `cache_salt`).
"""

import hashlib
import struct
from dataclasses import dataclass

from preble_sgl.core import BlockHashes, BlocksRemoved, BlocksStored, CacheEvent, block_hashes, token_ids

_SALT = b"sglang-cache-salt-v1\0"


@dataclass(frozen=True, slots=True)
class PageHashes:
    """The pages of one node: their hashes, the digest that the next page follows, and where they belong."""

    hashes: BlockHashes
    digest: bytes
    namespace: str


def root_pages(namespace: str) -> PageHashes:
    """Return what the first page of a namespace follows."""
    digest = hashlib.sha256(_SALT + namespace.encode()).digest() if namespace else b""
    return PageHashes(block_hashes(), digest, namespace)


def hashed_pages(before: PageHashes, key: bytes, page_size: int) -> PageHashes:
    """Return the pages of the packed tokens `key` behind `before`. O(key), at the speed of sha256."""
    hashes, digest = block_hashes(), before.digest
    page_bytes = 4 * page_size
    for start in range(0, len(key), page_bytes):
        digest = hashlib.sha256(digest + key[start : start + page_bytes]).digest()
        hashes.append(_name(digest))
    return PageHashes(hashes, digest, before.namespace)


class CacheNews:
    """Collects events in the order in which they happen. O(tokens) per event, at the speed of sha256."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._events: list[CacheEvent] = []

    def add(self, event: CacheEvent) -> None:
        """Tell an event."""
        self._events.append(event)

    def stored(self, before: PageHashes, key: bytes) -> PageHashes:
        """Tell that the pages `key` are cached behind `before`, and return them."""
        pages = hashed_pages(before, key, self._page_size)
        ids = token_ids()
        ids.frombytes(key)
        self.add(
            BlocksStored(
                block_hashes=pages.hashes,
                parent_hash=_name(before.digest) if before.hashes else None,
                token_ids=ids,
                block_size=self._page_size,
                namespace=pages.namespace,
            )
        )
        return pages

    def removed(self, pages: PageHashes) -> None:
        """Tell that the pages of a node are evicted; what is evicted one after the other is one event."""
        gone = pages.hashes
        if self._events and isinstance(self._events[-1], BlocksRemoved):
            gone = self._events.pop().block_hashes + gone  # type: ignore[union-attr]
        self.add(BlocksRemoved(gone))

    def split(self, before: PageHashes, key: bytes, whole: PageHashes) -> tuple[PageHashes, PageHashes]:
        """Return the two parts of a node's pages, the first of which are `key` behind `before`. O(key)."""
        upper = hashed_pages(before, key, self._page_size)
        lower = PageHashes(whole.hashes[len(upper.hashes) :], whole.digest, whole.namespace)
        return upper, lower

    def take(self) -> list[CacheEvent]:
        """Return the events since the last time."""
        events, self._events = self._events, []
        return events


def _name(digest: bytes) -> int:
    name: int = struct.unpack(">q", digest[:8])[0]
    return name
