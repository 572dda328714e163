"""Which node of the prefix tree holds which page of one worker whose runtime tells what it caches.

A runtime names a page by a hash (see `core.BlockHashes`). A node keeps the hashes of the pages that *end* in
it, 8 bytes a page; the index knows, per node, only the last of them. That is enough: what a runtime evicts
ends where a node ends, and so does the prefix behind which it stores, if the tree was cut there for the
request that caused it. Any other page is found by looking through all of them.
"""

from collections.abc import Iterable, Sequence

from preble_sgl.core import BlockHashes, WorkerId
from preble_sgl.global_sched.node import Node, Share


class BlockIndex:
    """The pages that one worker has for certain, and the tails of prefixes that it has perhaps.

    `stored_tokens` counts the certain ones. `doubts`: tails of what finished requests must have left in the
    cache and the runtime has not told yet, `doubted_len` tokens at most.
    """

    __slots__ = ("_ends", "_page_size", "_worker_id", "doubted_len", "doubts", "stored_tokens")

    def __init__(self, worker_id: WorkerId, page_size: int) -> None:
        self._worker_id = worker_id
        self._page_size = page_size
        self._ends: dict[int, Node] = {}
        self.stored_tokens = 0
        self.doubts: list[Node] = []
        self.doubted_len = 0

    def record(self, node: Node, blocks: BlockHashes) -> None:
        """Note that the worker has the pages that end in `node`; there is at least one. O(1)."""
        node.shares[self._worker_id].blocks = blocks
        self._ends[blocks[-1]] = node
        self.stored_tokens += len(blocks) * self._page_size

    def erase(self, node: Node) -> int:
        """Note that the pages of `node` are no longer certain; return how many they were. O(1)."""
        share = node.shares[self._worker_id]
        blocks, share.blocks = share.blocks, None
        assert blocks is not None
        self._ends.pop(blocks[-1], None)
        self.stored_tokens -= len(blocks) * self._page_size
        return len(blocks)

    def split(self, upper: Node, lower_share: Share) -> None:
        """Hand the pages that end in the new node `upper` over to it. O(pages)."""
        blocks = lower_share.blocks
        assert blocks is not None
        at = self._num_pages(upper)
        if at:
            upper.shares[self._worker_id].blocks = blocks[:at]
            self._ends[blocks[at - 1]] = upper
            lower_share.blocks = blocks[at:] or None

    def doubt(self, tail: Node) -> None:
        """Remember a tail that the runtime has not confirmed. O(d)."""
        self.doubts.append(tail)
        node: Node | None = tail
        while node is not None and node.parent is not None and not self.has_blocks(node):
            self.doubted_len += node.num_tokens
            node = node.parent

    def take_doubts(self) -> list[Node]:
        """Return the doubted tails, and remember them no longer."""
        tails, self.doubts, self.doubted_len = self.doubts, [], 0
        return tails

    def has_blocks(self, node: Node) -> bool:
        """Say whether the worker has pages for certain that end in `node`."""
        share = node.shares.get(self._worker_id)
        return share is not None and share.blocks is not None

    def has_blocks_below(self, node: Node) -> bool:
        """Say whether the worker has pages for certain behind a node. O(uncertain nodes below)."""
        below = list(node.children.values())
        while below:
            child = below.pop()
            if self.has_blocks(child):
                return True
            if self._worker_id in child.shares:
                below.extend(child.children.values())
        return False

    def ends(self, hashes: Iterable[int]) -> list[int]:
        """Return those of the pages that are the last of a node, the deepest first. O(hashes)."""
        ends = [block_hash for block_hash in hashes if block_hash in self._ends]
        return sorted(ends, key=lambda block_hash: -self._ends[block_hash].end_len)

    def node(self, block_hash: int) -> Node:
        """Return the node whose last page this is."""
        return self._ends[block_hash]

    def find(self, block_hash: int) -> tuple[Node, int] | None:
        """Return the node that ends with a page, and the length of the prefix that ends with it. O(1)."""
        node = self._ends.get(block_hash)
        return None if node is None else (node, node.end_len - node.end_len % self._page_size)

    def search(self, block_hash: int) -> tuple[Node, int] | None:
        """Return the same for any page, wherever in its node it ends. O(pages of the worker)."""
        for node in self._ends.values():
            blocks = node.shares[self._worker_id].blocks
            assert blocks is not None
            if block_hash in blocks:
                pages_before = node.start_len // self._page_size
                return node, (pages_before + blocks.index(block_hash) + 1) * self._page_size
        return None

    def check_invariants(self, held: Sequence[Node]) -> None:
        """Assert that the index fits the nodes that the worker has, and that no untold leaf is forgotten."""
        told = [node for node in held if self.has_blocks(node)]
        ends: dict[int, Node] = {}
        for node in told:
            blocks = node.shares[self._worker_id].blocks
            assert blocks is not None
            assert len(blocks) == self._num_pages(node) > 0
            assert node.shares[self._worker_id].computed
            parent = node.parent
            assert parent is not None
            assert parent.parent is None or self.has_blocks(parent) or not self._num_pages(parent)
            ends[blocks[-1]] = node
        assert self._ends == ends
        assert self.stored_tokens == sum(self._num_pages(node) for node in told) * self._page_size
        for node in held:
            is_untold_leaf = node.shares[self._worker_id].is_evictable and not self.has_blocks(node)
            assert not is_untold_leaf or node in self.doubts

    def _num_pages(self, node: Node) -> int:
        """Return how many pages end in a node."""
        return node.end_len // self._page_size - node.start_len // self._page_size
