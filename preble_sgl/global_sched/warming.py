"""Warm-ups: prefixes to compute on a worker ahead of use, and which are worth it.

A warm-up is a request that generates nothing. It must not delay a call: it is proposed for workers that do
nothing at all, a few hundred tokens at a time, and only if it fits into free room; whoever runs it gives it
up when a call is placed there. What a prefix is worth are the prefill seconds that it saves the calls to
come: those of open programs that plan to use it, and as many as in the last window.

Only *cold* workers are warmed, as after a restart. Copying what is hot to every idle worker was tried: while
nothing was wrong it let calls wait 4 to 16 % longer for their first token and saved nothing, because placing
and stealing copy what is needed (`benchmarks/experiments/warming.py`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from preble_sgl.core import WarmUp, WorkerId
from preble_sgl.global_sched.node import Node, ancestors
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.worker import Worker

MIN_LEN = 32
"""Tokens below which a prefix is not worth a request."""
STEP_LEN = 512
"""Tokens that are computed at a time: a call that comes meanwhile waits for no more."""
COLD_SHARE = 0.5
"""A worker is cold with less than this share of what the others have cached on average."""


class Warming:
    """Finds what is worth computing ahead of use. Reads the scheduler's tree and workers."""

    def __init__(self, tree: RadixTree, workers: Mapping[WorkerId, Worker]) -> None:
        self._tree = tree
        self._workers = workers
        self._under_way: dict[WorkerId, WarmUp] = {}

    def propose(self) -> list[WarmUp]:
        """Return the best warm-up for each worker that is idle, if one is worth it. O(idle * nodes).

        Each has to be reported `done`, and no other is proposed for its worker before.
        """
        idle = [worker for worker in self._open() if _is_idle(worker) and self._is_cold(worker)]
        proposals = [
            found
            for worker in idle
            if worker.worker_id not in self._under_way and (found := self._best(worker)) is not None
        ]
        self._under_way |= {warm_up.worker_id: warm_up for warm_up in proposals}
        return proposals

    def rescue(self, worker_id: WorkerId) -> list[WarmUp]:
        """Return what only this worker has and calls to come will use, each for another, the best first.

        For a worker that is about to leave: it must not take requests any more. O(nodes * log nodes).
        """
        leaving = self._workers[worker_id]
        room = {worker.worker_id: self._tree.free_tokens(worker.worker_id) for worker in self._open()}
        covered: dict[Node, WorkerId] = {}
        found: list[WarmUp] = []
        nodes = (node for node in self._tree.trie.nodes() if _only_on(node, worker_id, room))
        for node in sorted(nodes, key=lambda node: _saved_s(node, leaving, 0), reverse=True):
            target = self._target(node, covered, room)
            if target is not None and _weight(node) and node not in covered:
                found.append(self._warm_up(node, target, _saved_s(node, leaving, 0)))
                room[target] -= node.end_len - _len_in(node, covered)
                covered |= dict.fromkeys(ancestors(node), target)
        return found

    def done(self, warm_up: WarmUp, *, computed: bool) -> None:
        """Learn that a warm-up has ended; its runtime has the prefix if it was `computed`."""
        worker_id = warm_up.worker_id
        if self._under_way.get(worker_id) is warm_up:
            del self._under_way[worker_id]
        if computed and worker_id in self._workers and self._tree.index(worker_id) is None:
            self._tree.insert(warm_up.namespace, warm_up.prefix.tobytes(), worker_id)

    def forget(self, worker_id: WorkerId) -> None:
        """Forget a worker that is gone."""
        self._under_way.pop(worker_id, None)

    def _open(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if not worker.is_draining]

    def _is_cold(self, worker: Worker) -> bool:
        """Say whether a worker has next to nothing cached beside the others, as one that just came up."""
        others = [self._tree.used_tokens(one.worker_id) for one in self._open() if one is not worker]
        used = self._tree.used_tokens(worker.worker_id)
        return bool(others) and used < COLD_SHARE * sum(others) / len(others)

    def _best(self, worker: Worker) -> WarmUp | None:
        """Return the prefix that saves most on a worker; None if none saves more than it costs."""
        num_workers = len(self._open())
        candidates = [
            (gain_s, node)
            for node, matched_len in self._missing(worker)
            if (gain_s := (_weight(node) / num_workers - 1) * _saved_s(node, worker, matched_len, 1)) > 0
        ]
        if not candidates:
            return None
        gain_s, node = max(candidates, key=lambda candidate: candidate[0])
        return self._next_step(self._warm_up(node, worker.worker_id, gain_s))

    def _next_step(self, whole: WarmUp) -> WarmUp:
        """Cut a warm-up to what may be computed without making a call wait for long."""
        match = self._tree.match(whole.namespace, whole.prefix.tobytes())
        return replace(whole, prefix=whole.prefix[: match.len_on(whole.worker_id) + STEP_LEN])

    def _missing(self, worker: Worker) -> Iterator[tuple[Node, int]]:
        """Yield what others have and this worker has room for, with how much of it it has. O(nodes)."""
        worker_id, free_len = worker.worker_id, self._tree.free_tokens(worker.worker_id)
        for node in self._tree.trie.nodes():
            if worker_id not in node.shares and any(share.computed for share in node.shares.values()):
                matched_len = next((n.end_len for n in ancestors(node) if worker_id in n.shares), 0)
                if MIN_LEN <= node.end_len - matched_len <= free_len:
                    yield node, matched_len

    def _target(
        self, node: Node, covered: Mapping[Node, WorkerId], room: Mapping[WorkerId, int]
    ) -> WorkerId | None:
        """Return the worker for a prefix: where its beginning goes already, else the one with most room."""
        begun = next((covered[n] for n in ancestors(node) if n in covered), None)
        target = begun or max(room, key=lambda worker_id: room[worker_id], default=None)
        if target is None or room[target] < node.end_len - _len_in(node, covered):
            return None
        return target

    def _warm_up(self, node: Node, worker_id: WorkerId, value_s: float) -> WarmUp:
        namespace, prefix = self._tree.trie.prefix(node)
        return WarmUp(worker_id=worker_id, prefix=prefix, namespace=namespace, value_s=value_s)


def _is_idle(worker: Worker) -> bool:
    return not (worker.num_bound or worker.backlog_s)


def _weight(node: Node) -> int:
    """Return how many calls to come are expected to use a prefix."""
    return node.expected + sum(node.recent.values())


def _saved_s(node: Node, worker: Worker, matched_len: int, num_calls: int | None = None) -> float:
    """Return the prefill seconds that calls save; by default all that are expected to use it."""
    calls = _weight(node) if num_calls is None else num_calls
    return calls * worker.profile.prefill_s(node.end_len - matched_len, matched_len)


def _only_on(node: Node, worker_id: WorkerId, others: Iterable[WorkerId]) -> bool:
    share = node.shares.get(worker_id)
    if share is None or not share.computed or node.end_len < MIN_LEN:
        return False
    return not any(other in node.shares for other in others)


def _len_in(node: Node, covered: Mapping[Node, WorkerId]) -> int:
    return next((n.end_len for n in ancestors(node) if n in covered), 0)
