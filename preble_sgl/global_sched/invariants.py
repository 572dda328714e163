"""What must always be true of a tree node, of a worker's cache and of a worker's sums.

The owners' `check_invariants` call these; tests call the owners after every step.
"""

from collections.abc import Sequence
from math import isclose

from preble_sgl.global_sched.eviction import WorkerCache
from preble_sgl.global_sched.node import TOKEN_BYTES, Node, Share
from preble_sgl.global_sched.worker import Visit, Worker


def check_node(node: Node) -> None:
    """Assert that a node fits its parent, is needed, and that every share of it is consistent."""
    parent = node.parent
    assert parent is not None
    assert parent.children[node.key[:TOKEN_BYTES]] is node
    assert node.num_tokens * TOKEN_BYTES == len(node.key) > 0
    assert node.start_len == parent.end_len
    assert node.shares or node.recent or node.children, "nobody needs this node"
    assert all(num_requests > 0 for num_requests in node.recent.values())
    assert node.expected >= 0
    for worker_id, share in node.shares.items():
        assert parent.parent is None or worker_id in parent.shares, "a prefix has no holes"
        children = [child.shares[worker_id] for child in node.children.values() if worker_id in child.shares]
        _check_share(share, children)


def check_cache(cache: WorkerCache, shares: Sequence[Share], num_tokens: int, *, is_exact: bool) -> None:
    """Assert that a worker's shares of `num_tokens` in sum are counted, listed, and evicted if too many."""
    assert cache.used == num_tokens
    listed = [id(share) for _, _, _, share in cache.order.entries() if share.listed]
    assert len(listed) == len(set(listed))
    assert {id(share) for share in shares if share.listed} == set(listed)
    full = cache.used > cache.capacity and not is_exact
    assert not full or not any(share.is_evictable for share in shares)
    assert is_exact or all(share.blocks is None for share in shares)


def check_worker(worker: Worker, unfinished: Sequence[Visit], recent: Sequence[Visit]) -> None:
    """Assert that a worker's running sums are the sums over its visits."""
    waiting = [visit for visit in unfinished if visit.phase != "decode"]
    num_by_phase = [
        sum(visit.phase == name for visit in unfinished) for name in ("held", "prefill", "decode")
    ]
    assert num_by_phase == [worker.num_held, worker.num_prefill, worker.num_decode]
    assert worker.num_bound == len(unfinished)
    assert worker.prefill_wait_s == worker.profile.batch_s(worker.pending_prefill_tokens)
    assert worker.pending_prefill_tokens == sum(visit.missed_len for visit in waiting)
    assert isclose(worker.pending_prefill_s, sum(visit.prefill_s for visit in waiting), abs_tol=1e-6)
    assert worker.num_recent == len(recent)
    assert isclose(worker.recent_prefill_s, sum(visit.prefill_s for visit in recent), abs_tol=1e-6)
    outputs = [visit.output_len for visit in recent if visit.output_len is not None]
    assert (worker.outputs.num, worker.outputs.total) == (len(outputs), sum(outputs))


def _check_share(share: Share, children: Sequence[Share]) -> None:
    assert share.num_children == len(children)
    assert share.locks >= 0
    assert share.computed != bool(share.claims), "pending nodes, and only they, are claimed"
    assert share.computed or not any(child.computed for child in children)
    assert share.computed or all(child.claims.keys() <= share.claims.keys() for child in children)
    assert share.listed or not share.is_evictable
