"""The parts of the prefix tree: nodes, what each worker has of them, and what looking into the tree finds.

A node is an edge label and the subtree behind it. Its `end_len` is the length of the prefix it completes.
When an edge is split the object keeps the *lower* part, so a reference to a node stays a reference to the
same prefix for as long as the node lives.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from preble_sgl.core import BlockHashes, RequestId, WorkerId
from preble_sgl.global_sched.trend import QueueingTrend

TOKEN_BYTES = 4
"""Tokens are packed as int32: an edge of n tokens is n * TOKEN_BYTES bytes."""


@dataclass(slots=True, eq=False)
class Share:
    """What one worker has of one node.

    `computed`: its KV exists; otherwise placed requests are going to compute it, and `claims` names them in
    the order in which they were bound. `locks`: unfinished requests whose prompt ends here. `num_children`:
    child nodes that this worker has too. `last_used`: tick of the last use of this node or of a part evicted
    below. `listed`: it has an entry in the eviction order. `blocks`: the hashes of the pages that end in the
    node, where the worker's runtime told that it has them; None if it told nothing or no page ends here.
    """

    last_used: int
    computed: bool = False
    locks: int = 0
    num_children: int = 0
    listed: bool = False
    claims: dict[RequestId, None] = field(default_factory=dict)
    blocks: "BlockHashes | None" = None

    @property
    def is_evictable(self) -> bool:
        """Say whether the runtime could evict it now: a computed leaf that no request is using."""
        return self.computed and not self.num_children and not self.locks

    @property
    def is_unclaimed(self) -> bool:
        """Say whether its KV neither exists nor is going to."""
        return not self.computed and not self.claims


@dataclass(slots=True, eq=False)
class Node:
    """One edge of the tree.

    `recent`: per worker, the requests in window H that have it as prefix. `expected`: open programs whose
    plans say that calls to come will have it as prefix.
    """

    key: bytes
    parent: "Node | None"
    end_len: int
    num_tokens: int
    children: dict[bytes, "Node"] = field(default_factory=dict)
    shares: dict[WorkerId, Share] = field(default_factory=dict)
    recent: dict[WorkerId, int] = field(default_factory=dict)
    trends: dict[WorkerId, QueueingTrend] = field(default_factory=dict)
    expected: int = 0

    @property
    def start_len(self) -> int:
        """Tokens in front of this node."""
        return self.end_len - self.num_tokens

    @property
    def is_key_portion(self) -> bool:
        """Say whether the node is longer than all in front of it (Preble's key portion of a prompt)."""
        return self.num_tokens > self.start_len


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of a prompt: its nodes, its length, and how much of it each worker has.

    The last node of the path may be matched in part. `lens` counts whole pages, tokens still pending
    included, and leaves out workers that have nothing.
    """

    path: Sequence[Node]
    known_len: int
    lens: Mapping[WorkerId, int]

    @property
    def last_whole_node(self) -> Node | None:
        """Return the deepest node that lies on the prompt as a whole."""
        for node in reversed(self.path):
            if node.end_len <= self.known_len:
                return node
        return None

    def len_on(self, worker_id: WorkerId) -> int:
        """Return the matched tokens of one worker."""
        return self.lens.get(worker_id, 0)

    def key_node(self, worker_id: WorkerId) -> Node | None:
        """Return the deepest key portion that a worker has; None if it has none. O(path)."""
        keys = (node for node in reversed(self.path) if node.is_key_portion and worker_id in node.shares)
        return next(keys, None)


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a bound request will find: tokens computed by then, tokens that others compute first, and who."""

    computed_len: int
    awaited_len: int
    leaders: tuple[RequestId, ...]


def uncomputed(tail: Node, worker_id: WorkerId) -> Iterator[tuple[Node, Share]]:
    """Yield, going up, the end of a prompt whose KV a worker has yet to compute."""
    node = tail
    while node.parent is not None:
        share = node.shares[worker_id]
        if share.computed:
            return
        yield node, share
        node = node.parent


def ancestors(tail: Node) -> Iterator[Node]:
    """Yield a node and everything in front of it, going up."""
    node = tail
    while node.parent is not None:
        yield node
        node = node.parent
