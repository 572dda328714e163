"""Requests that have a worker, from the binding to the end.

    bind ─┬────────► ready ─► start ─► prefill ─► decode ─► finish
          └─► held ──┘
             (prefix_first.py)

Which worker, and when, was decided before (`scheduler.py`); what happens here is the same for every policy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from preble_sgl.core import Placement, ProgramId, Request, RequestId, TokenIds
from preble_sgl.errors import InputError
from preble_sgl.global_sched.invariants import check_worker
from preble_sgl.global_sched.node import TOKEN_BYTES, Match
from preble_sgl.global_sched.policies.protocol import Decision
from preble_sgl.global_sched.prefix_first import MIN_SHARED_LEN, Holds
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.window import Window
from preble_sgl.global_sched.worker import Visit, Worker


@dataclass(frozen=True, slots=True, eq=False)
class Queued:
    """A request as it was submitted. Its number is its place in the queue, also when it returns there."""

    request: Request
    packed: bytes
    number: int
    submitted_at: float

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def program_id(self) -> ProgramId:
        return self.request.program_id


@dataclass(slots=True, eq=False)
class Bound:
    """A request with a worker.

    `matched_len`: what it will find cached, known once it may start. `promised_len`: KV tokens promised to
    its program for it. `charged_s`: what its tenant was charged for it, in worker seconds.
    """

    queued: Queued
    visit: Visit
    decision: Decision
    matched_len: int = 0
    promised_len: int = 0
    charged_s: float = 0.0

    @property
    def request_id(self) -> RequestId:
        return self.queued.request.request_id


class Bindings:
    """The bound requests and which of them may start. Keeps tree, window and worker loads in step."""

    def __init__(self, tree: RadixTree, window: Window, *, prefix_first: bool) -> None:
        self._tree = tree
        self._window = window
        self._prefix_first = prefix_first
        self._numbers = count()
        self._bound: dict[RequestId, Bound] = {}
        self._holds = Holds()
        self._ready: dict[RequestId, Bound] = {}

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._bound

    def __getitem__(self, request_id: RequestId) -> Bound:
        return self._bound[request_id]

    def __len__(self) -> int:
        return len(self._bound)

    @property
    def num_held(self) -> int:
        """Requests with a worker that were not started yet."""
        return len(self._holds) + len(self._ready)

    def match(self, queued: Queued) -> Match:
        """Return what the fleet has of a request's prompt, as far as a runtime could reuse it."""
        usable = queued.packed[: reusable_len(queued.request) * TOKEN_BYTES]
        return self._tree.match(queued.request.namespace, usable)

    def bind(self, queued: Queued, worker: Worker, match: Match, decision: Decision, now: float) -> Bound:
        """Reserve a prompt on a worker."""
        request = queued.request
        tail = self._tree.bind(
            request.namespace, queued.packed, worker.worker_id, request.request_id, match.last_whole_node
        )
        visit = Visit(next(self._numbers), now, worker, tail, len(request.prompt))
        worker.admit(visit, visit.prompt_len - match.len_on(worker.worker_id))
        self._window.add(visit)
        bound = self._bound[request.request_id] = Bound(queued, visit, decision)
        self._hold_or_ready(bound)
        return bound

    def start_ready(self) -> list[Placement]:
        """Return what may start now, in the order in which it became ready."""
        placements = [self._start(bound) for bound in self._ready.values()]
        self._ready.clear()
        return placements

    def sent(self, request_id: RequestId) -> Bound:
        """Return a request that its worker is working on. Raises InputError if it was not sent yet."""
        bound = self._bound.get(request_id)
        if bound is None or bound.visit.phase == "held":
            raise InputError(f"request {request_id} was not sent yet; dispatch returns it when it may start")
        return bound

    def first_token(self, bound: Bound, now: float) -> float:
        """Record that a prompt is computed; its followers may start. Returns the queueing time in seconds."""
        visit, worker = bound.visit, bound.visit.worker
        queueing_s = now - bound.queued.submitted_at
        self._tree.mark_computed(visit.tail, worker.worker_id)
        self._tree.add_queueing(visit.tail, worker.worker_id, queueing_s, now)
        worker.move(visit, "decode")
        self._wake_followers(bound.request_id)
        return queueing_s

    def finish(self, bound: Bound, output: TokenIds, cached_tokens: int, output_len: int) -> None:
        """Record the end of a request. The last output token was sampled and has no KV."""
        visit, worker_id = bound.visit, bound.visit.worker.worker_id
        packed = bound.queued.packed + output[:-1].tobytes()
        prompt_tail = visit.tail
        namespace = bound.queued.request.namespace
        self._window.extend(visit, self._tree.insert(namespace, packed, worker_id, behind=prompt_tail))
        self._tree.unlock(prompt_tail, worker_id)
        visit.worker.finish(visit, cached_tokens, output_len)
        self._window.close(visit)
        del self._bound[bound.request_id]
        self._wake_followers(bound.request_id)

    def unbind(self, request_id: RequestId) -> Bound:
        """Take a request off its worker, which goes on without it."""
        bound = self._bound[request_id]
        visit = bound.visit
        self._tree.release(visit.tail, visit.worker.worker_id, request_id)
        if visit.phase != "decode":
            self._window.drop(visit)  # nothing was computed
        visit.worker.move(visit, "done")
        self._window.close(visit)
        self._forget(bound)
        self._wake_followers(request_id)
        return bound

    def lose(self, worker: Worker) -> list[Bound]:
        """Forget all requests of a worker that is gone; return them in the order of binding."""
        lost = self.on_worker(worker)
        for bound in lost:
            self._forget(bound)
        return lost

    def rebind(self, worker: Worker) -> None:
        """Reserve the prompts of a worker's requests again, after it has lost its cache."""
        rebound = self.on_worker(worker)
        for bound in rebound:
            queued, visit = bound.queued, bound.visit
            namespace, worker_id = queued.request.namespace, worker.worker_id
            visit.tail = self._tree.bind(namespace, queued.packed, worker_id, bound.request_id)
            if visit.phase == "decode":
                self._tree.mark_computed(visit.tail, worker_id)
        for bound in rebound:
            if bound.visit.phase == "held":
                self._hold_or_ready(bound)

    def on_worker(self, worker: Worker) -> list[Bound]:
        """Return a worker's requests in the order of binding."""
        return self._in_order(rid for rid, bound in self._bound.items() if bound.visit.worker is worker)

    def check_invariants(self, workers: Iterable[Worker]) -> None:
        """Assert that loads, window and holds agree with the bound requests. O(requests)."""
        for worker in workers:
            visits = [bound.visit for bound in self.on_worker(worker)]
            check_worker(worker, visits, self._window.recent(worker, visits))
        for request_id, bound in self._bound.items():
            waits, is_ready = request_id in self._holds, request_id in self._ready
            assert waits + is_ready == (bound.visit.phase == "held")
            for leader in self._holds.leaders(request_id):
                assert self._bound[leader].visit.number < bound.visit.number, "waiting goes round in a circle"

    def _hold_or_ready(self, bound: Bound) -> None:
        """Let a request start, unless others are about to compute much of its prompt."""
        request, visit = bound.queued.request, bound.visit
        prospect = self._tree.prospect(visit.tail, visit.worker.worker_id, request.request_id)
        if self._prefix_first and prospect.awaited_len >= MIN_SHARED_LEN:
            self._ready.pop(request.request_id, None)
            self._holds.hold(request.request_id, prospect.leaders)
            return
        self._holds.free(request.request_id)
        self._ready[request.request_id] = bound
        cached_len = min(prospect.computed_len, reusable_len(request))
        bound.matched_len = cached_len - cached_len % visit.worker.page_size

    def _start(self, bound: Bound) -> Placement:
        visit, decision = bound.visit, bound.decision
        visit.worker.reprice(visit, visit.prompt_len - bound.matched_len)
        visit.worker.move(visit, "prefill")
        return Placement(
            bound.request_id, decision.worker_id, bound.matched_len, decision.reason, decision.costs
        )

    def _wake_followers(self, leader: RequestId) -> None:
        """Look again, in the order of binding, at the requests that waited for `leader`."""
        followers = self._holds.followers(leader)
        for follower in self._in_order(followers) if followers else ():
            self._hold_or_ready(follower)

    def _forget(self, bound: Bound) -> None:
        del self._bound[bound.request_id]
        self._ready.pop(bound.request_id, None)
        self._holds.free(bound.request_id)

    def _in_order(self, request_ids: Iterable[RequestId]) -> list[Bound]:
        return sorted((self._bound[rid] for rid in request_ids), key=lambda bound: bound.visit.number)


def reusable_len(request: Request) -> int:
    """Return how many prompt tokens a runtime can take from its cache.

    SGLang always computes the last one, and everything from the first one it has to score.
    """
    return (request.score_from or len(request.prompt)) - 1
