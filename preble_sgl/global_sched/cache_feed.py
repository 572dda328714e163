"""What one runtime tells of its KV cache, applied to the prefix tree in the order in which it happened.

A runtime numbers its batches of events from 0. Batch 0, or any batch in which the cache is cleared, starts a
history: what was known before is forgotten, and from there the worker is exact, as long as no batch is
missing. When one is, the caller replays from `next_seq` or gives up (`lose`), and the worker is estimated
until a history starts again.

Events come late: SGLang publishes with the next prefill, every 40 decode steps and when it falls idle. So
what a request must have left in the cache is believed when it ends, and *doubted*: the first batch after its
end was published after it, as a rule, and has told what became of it. What it did not tell is dropped then.
If that was too early, because the batch was on its way already, the event that follows brings it back. Once
a batch that was published after the last request has been applied, the tree has what the runtime has, no
more and no less, except what unfinished requests use: that is kept for them, and doubted at their end.

A caller tells a restarted runtime from a repeated batch like this. Batch 0 always starts afresh, so a replay
that begins at 0 is always right; any other replay begins at `next_seq`. After a lost connection it begins at
0, since the batches of another process may carry the awaited numbers. Live batches of one process only count
up: one that is "old" although no replay has brought it before comes from a restarted runtime whose batch 0
got lost, and asks for a replay from 0.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from preble_sgl.core import BlockHashes, BlocksRemoved, BlocksStored, CacheCleared, CacheEvent, WorkerId
from preble_sgl.errors import InputError
from preble_sgl.global_sched.block_index import BlockIndex
from preble_sgl.global_sched.node import Node
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.snapshot import FeedCount, FeedSnapshot

FeedStatus = Literal["applied", "started", "gap", "old"]


@dataclass(frozen=True, slots=True)
class FeedResult:
    """What became of a batch, and the number of the next one that can be applied.

    applied: it was the next; started: it starts a history; gap: batches before it are missing, nothing was
    done; old: it was there before, nothing was done.
    """

    status: FeedStatus
    next_seq: int


class CacheFeed:
    """Keeps one worker's part of the tree as its runtime tells."""

    def __init__(self, tree: RadixTree, worker_id: WorkerId, page_size: int) -> None:
        self._tree = tree
        self._worker_id = worker_id
        self._page_size = page_size
        self._next_seq = 0
        self._counts: Counter[FeedCount] = Counter()

    def receive(self, seq: int, events: Sequence[CacheEvent]) -> FeedResult:
        """Apply a batch if it is its turn. O(tokens stored + pages removed), O(nodes) when a history starts.

        Raises InputError, and applies nothing, if the batch cannot come from a runtime of this page size.
        """
        self._check(seq, events)
        status, events = self._in_history(seq, events)
        self._counts[status] += 1
        if status == "started":
            self._tree.start_exact(self._worker_id)
        if status in ("started", "applied"):
            for event in events:
                self._apply(event)
            self._counts["refuted_tokens"] += self._tree.settle(self._worker_id)
            self._next_seq = seq + 1
        return FeedResult(status, self._next_seq)

    def lose(self) -> None:
        """Estimate from now on; a batch that starts a history ends that. O(nodes)."""
        self._tree.end_exact(self._worker_id)
        self._next_seq = 0

    def snapshot(self) -> FeedSnapshot:
        """Return the state as plain values."""
        return FeedSnapshot(
            is_live=self.is_live,
            next_seq=self._next_seq,
            stored_tokens=self._index.stored_tokens if self.is_live else 0,
            counts={name: number for name, number in self._counts.items() if number},
        )

    @property
    def is_live(self) -> bool:
        """Say whether the worker is exact: a history has started, and nothing of it is missing."""
        return self._tree.index(self._worker_id) is not None

    @property
    def _index(self) -> BlockIndex:
        index = self._tree.index(self._worker_id)
        assert index is not None
        return index

    def _check(self, seq: int, events: Sequence[CacheEvent]) -> None:
        if seq < 0:
            raise InputError(f"worker {self._worker_id}: seq={seq}: batches are numbered from 0")
        for event in events:
            if isinstance(event, BlocksStored) and event.block_size != self._page_size:
                raise InputError(
                    f"worker {self._worker_id} stores blocks of {event.block_size} tokens and came up with "
                    f"page_size={self._page_size}; report the page size it runs with"
                )

    def _in_history(self, seq: int, events: Sequence[CacheEvent]) -> tuple[FeedStatus, Sequence[CacheEvent]]:
        """Say where a batch belongs, and which of its events count."""
        if seq == 0:
            return "started", events
        if self.is_live and seq <= self._next_seq:
            return ("applied" if seq == self._next_seq else "old"), events
        clears = [i for i, event in enumerate(events) if isinstance(event, CacheCleared)]
        return ("started", events[clears[-1] :]) if clears else ("gap", events)

    def _apply(self, event: CacheEvent) -> None:
        match event:
            case BlocksStored():
                self._store(event)
            case BlocksRemoved():
                self._remove(set(event.block_hashes))
            case CacheCleared():
                self._tree.start_exact(self._worker_id)

    def _store(self, event: BlocksStored) -> None:
        behind = None
        if event.parent_hash is not None:
            behind = self._find(event.parent_hash)
            if behind is None:
                self._counts["orphan_blocks"] += len(event.block_hashes)
                return
        if event.block_hashes:
            tail = self._tree.store(event.namespace, behind, event.token_ids.tobytes(), self._worker_id)
            self._record(tail, 0 if behind is None else behind[1], event.block_hashes)

    def _find(self, block_hash: int) -> tuple[Node, int] | None:
        """Return where a page ends. O(1) unless the request that goes on there did not come through us."""
        place = self._index.find(block_hash)
        if place is None:
            self._counts["searches"] += 1
            place = self._index.search(block_hash)
        return place

    def _record(self, tail: Node, behind_len: int, blocks: BlockHashes) -> None:
        """Divide the hashes of pages stored behind a prefix of `behind_len` tokens among their nodes."""
        node, num_before = tail, behind_len // self._page_size
        while node.end_len > behind_len and not self._index.has_blocks(node):
            first = max(node.start_len, behind_len) // self._page_size - num_before
            last = node.end_len // self._page_size - num_before
            if first < last:
                self._index.record(node, blocks[first:last])
            assert node.parent is not None
            node = node.parent

    def _remove(self, gone: set[int]) -> None:
        """Take away pages. What a runtime evicts ends where nodes end; anything else it cannot mean."""
        num_known = 0
        for block_hash in self._index.ends(gone):
            node = self._index.node(block_hash)
            if not self._index.has_blocks_below(node):
                num_known += self._remove_end(node, gone)
        self._counts["unknown_blocks"] += len(gone) - num_known

    def _remove_end(self, node: Node, gone: set[int]) -> int:
        """Take away the last pages of a node, as far as they are gone; return how many they are.

        What is in use stays, untold: a waiting request that was promised it will compute it again.
        """
        share = node.shares[self._worker_id]
        blocks = share.blocks
        assert blocks is not None
        num_kept = len(blocks)
        while num_kept and blocks[num_kept - 1] in gone:
            num_kept -= 1
        if num_kept:
            self._tree.cut(node, (node.start_len // self._page_size + num_kept) * self._page_size)
        num_gone = self._index.erase(node)
        if not share.is_evictable:
            self._counts["in_use_blocks"] += num_gone
        self._tree.give_up(node, self._worker_id)
        return num_gone
