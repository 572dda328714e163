"""The global scheduler: which request goes to which worker, and when.

One object, driven by calls that say what happened and when (`now`, seconds on the caller's clock, never
backwards). It does no I/O and owns no clock, so the live fleet and the simulator run the same code.

    submit ─► queue ─► match, choose, bind ─┬────────► ready ─► dispatch ─► prefill ─► decode ─► finish
                                            └─► held ──┘
                                               (prefix_first.py)

The policy picks the worker; everything else is the same for all policies, so that comparing two policies
compares placement and nothing else. After any call that may let a request start, call `dispatch`. A call
that raises has changed nothing.
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from preble_sgl.core import Placement, PlacementReason, Request, RequestId, TokenIds, WorkerId
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.invariants import check_worker
from preble_sgl.global_sched.node import TOKEN_BYTES, Match
from preble_sgl.global_sched.policies.protocol import Decision, FleetView, Policy
from preble_sgl.global_sched.prefix_first import MIN_SHARED_LEN, Holds
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.snapshot import SchedulerSnapshot, WorkerSnapshot
from preble_sgl.global_sched.window import Window
from preble_sgl.global_sched.worker import OutputLengths, Visit, Worker


@dataclass(frozen=True, slots=True)
class Queued:
    """A request as it was submitted. Its number is its place in the queue, also when it returns there."""

    request: Request
    number: int
    submitted_at: float


@dataclass(slots=True, eq=False)
class Bound:
    """A request with a worker. `matched_len` is what it will find cached, known once it may start."""

    queued: Queued
    visit: Visit
    decision: Decision
    matched_len: int = 0

    @property
    def request_id(self) -> RequestId:
        return self.queued.request.request_id


class GlobalScheduler:
    """Places requests on workers. Owns the prefix tree, the workers' loads and all unfinished requests."""

    def __init__(
        self, policy: Policy, *, rng: random.Random, window_s: float = 180.0, prefix_first: bool = True
    ) -> None:
        if not window_s > 0:
            raise InputError(f"window_s={window_s}: must be above 0")
        self._policy = policy
        self._rng = rng
        self._prefix_first = prefix_first
        self._now = float("-inf")
        self._numbers = count()
        self._tree = RadixTree(window_s)
        self._window = Window(window_s, self._tree)
        self._outputs = OutputLengths()
        self._workers: dict[WorkerId, Worker] = {}
        self._open_workers: tuple[Worker, ...] = ()
        self._queue: dict[RequestId, Queued] = {}
        self._bound: dict[RequestId, Bound] = {}
        self._holds = Holds()
        self._ready: dict[RequestId, Bound] = {}
        self._num_placements: Counter[PlacementReason] = Counter()

    # Workers

    def on_worker_up(
        self, worker_id: WorkerId, *, kv_tokens: int, page_size: int = 1, profile: CostProfile, now: float
    ) -> None:
        """Add a worker with an empty cache of `kv_tokens`. Raises InputError if it is up already."""
        self._check_time(now)
        self._tree.add_worker(worker_id, capacity=kv_tokens, page_size=page_size)
        self._advance(now)
        self._workers[worker_id] = Worker(worker_id, kv_tokens, page_size, profile, self._outputs)
        self._list_open_workers()

    def on_worker_drain(self, worker_id: WorkerId, now: float) -> None:
        """Place nothing more on a worker; it finishes what was sent to it. Raises UnknownIdError."""
        worker = self._worker(worker_id)
        self._advance(now)
        worker.is_draining = True
        self._list_open_workers()
        unsent = [bound for bound in self._bound_to(worker) if bound.visit.phase == "held"]
        for bound in unsent:
            self._unbind(bound)
        self._requeue(unsent)

    def on_worker_down(self, worker_id: WorkerId, now: float) -> list[RequestId]:
        """Forget a worker; return the unfinished requests that were sent to it, in the order of sending.

        They are queued again where they stood, like those held for it. O(nodes + requests).
        Raises UnknownIdError.
        """
        worker = self._worker(worker_id)
        self._advance(now)
        lost = self._bound_to(worker)
        for bound in lost:
            self._forget_bound(bound)
        self._window.forget_worker(worker_id)
        self._tree.forget_worker(worker_id)
        del self._workers[worker_id]
        self._list_open_workers()
        self._requeue(lost)
        return [bound.request_id for bound in lost if bound.visit.phase != "held"]

    def on_cache_cleared(self, worker_id: WorkerId, now: float) -> None:
        """Record that a worker has flushed its cache. O(nodes + requests). Raises UnknownIdError."""
        worker = self._worker(worker_id)
        self._advance(now)
        self._tree.clear(worker_id)
        rebound = self._bound_to(worker)
        for bound in rebound:
            request, visit = bound.queued.request, bound.visit
            packed = request.prompt.tobytes()
            visit.tail = self._tree.bind(request.namespace, packed, worker_id, request.request_id)
            if visit.phase == "decode":
                self._tree.mark_computed(visit.tail, worker_id)
        for bound in rebound:
            if bound.visit.phase == "held":
                self._hold_or_ready(bound)

    # Requests

    def submit(self, request: Request, now: float) -> None:
        """Queue a request. Raises InputError if its id belongs to an unfinished one."""
        request_id = request.request_id
        if request_id in self._queue or request_id in self._bound:
            raise InputError(f"request {request_id} was submitted already; give every request its own id")
        self._advance(now)
        self._queue[request_id] = Queued(request, next(self._numbers), now)

    def dispatch(self, now: float) -> list[Placement]:
        """Return what to send now, each request once: first those no longer held, then new ones, in order."""
        self._advance(now)
        if self._open_workers and self._queue:
            fleet = FleetView(self._open_workers, self._tree, now, self._rng)
            for queued in self._queue.values():
                self._bind(queued, fleet)
            self._queue.clear()
        placements = [self._start(bound) for bound in self._ready.values()]
        self._ready.clear()
        return placements

    def on_first_token(self, request_id: RequestId, now: float) -> None:
        """Record that a prompt is computed, so that its followers may start.

        Raises UnknownIdError, or InputError if the request was not sent or had its first token before.
        """
        bound = self._sent(request_id)
        if bound.visit.phase == "decode":
            raise InputError(f"request {request_id} had its first token before; report it once")
        self._advance(now)
        self._prefilled(bound)
        self._wake_followers(request_id)

    def on_finish(self, request_id: RequestId, *, output: TokenIds, cached_tokens: int, now: float) -> None:
        """Record the end of a request, its output and the prompt tokens that its runtime found cached.

        The last output token was sampled and never run through the model: it has no KV.
        Raises UnknownIdError, or InputError if the request was not sent or `cached_tokens` is impossible.
        """
        bound = self._sent(request_id)
        visit, request = bound.visit, bound.queued.request
        if not 0 <= cached_tokens <= visit.prompt_len:
            raise InputError(f"cached_tokens={cached_tokens}: the prompt has {visit.prompt_len} tokens")
        self._advance(now)
        if visit.phase == "prefill":
            self._prefilled(bound)
        packed = request.prompt.tobytes() + output[:-1].tobytes()
        prompt_tail, worker_id = visit.tail, visit.worker.worker_id
        self._window.extend(visit, self._tree.insert(request.namespace, packed, worker_id))
        self._tree.unlock(prompt_tail, worker_id)
        visit.worker.finish(visit, cached_tokens, len(output))
        self._window.close(visit)
        del self._bound[request_id]
        self._wake_followers(request_id)

    def on_cancel(self, request_id: RequestId, now: float) -> None:
        """Forget a request, queued or running. Raises UnknownIdError."""
        if request_id not in self._queue and request_id not in self._bound:
            raise _unknown_request(request_id)
        self._advance(now)
        if self._queue.pop(request_id, None) is None:
            self._unbind(self._bound[request_id])

    # Reading

    @property
    def num_queued(self) -> int:
        """Requests without a worker."""
        return len(self._queue)

    @property
    def num_held(self) -> int:
        """Requests with a worker that `dispatch` has not returned yet."""
        return len(self._holds) + len(self._ready)

    @property
    def num_running(self) -> int:
        """Requests that were sent and are not finished."""
        return len(self._bound) - self.num_held

    def snapshot(self) -> SchedulerSnapshot:
        """Return the state as plain values. O(workers)."""
        return SchedulerSnapshot(
            policy=self._policy.name,
            num_queued=self.num_queued,
            num_held=self.num_held,
            num_running=self.num_running,
            num_nodes=self._tree.num_nodes,
            workers=tuple(self._worker_snapshot(worker) for worker in self._workers.values()),
            num_placements=dict(self._num_placements),
        )

    def check_invariants(self) -> None:
        """Assert that tree, window, loads, queue and holds agree. O(nodes + requests)."""
        self._tree.check_invariants()
        assert not self._queue.keys() & self._bound.keys()
        numbers = [queued.number for queued in self._queue.values()]
        assert numbers == sorted(numbers)
        for worker in self._workers.values():
            visits = [bound.visit for bound in self._bound_to(worker)]
            check_worker(worker, visits, self._window.recent(worker, visits))
        for request_id, bound in self._bound.items():
            waits, is_ready = request_id in self._holds, request_id in self._ready
            assert waits + is_ready == (bound.visit.phase == "held")
            for leader in self._holds.leaders(request_id):
                assert self._bound[leader].visit.number < bound.visit.number, "waiting goes round in a circle"

    # The way of a request

    def _bind(self, queued: Queued, fleet: FleetView) -> None:
        """Choose a worker and reserve the prompt there."""
        request = queued.request
        packed = request.prompt.tobytes()
        match = self._tree.match(request.namespace, packed[: _reusable_len(request) * TOKEN_BYTES])
        decision = self._choose(request, match, fleet)
        worker = self._workers[decision.worker_id]
        assert not worker.is_draining, f"{self._policy.name} chose a worker that takes nothing new"
        tail = self._tree.bind(request.namespace, packed, worker.worker_id, request.request_id)
        visit = Visit(next(self._numbers), fleet.now, worker, tail, len(request.prompt))
        worker.admit(visit, visit.prompt_len - match.len_on(worker.worker_id))
        self._window.add(visit)
        bound = self._bound[request.request_id] = Bound(queued, visit, decision)
        self._hold_or_ready(bound)

    def _choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        if len(fleet.workers) == 1:
            return Decision(fleet.workers[0].worker_id, "only_worker")
        return self._policy.choose(request, match, fleet)

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
        cached_len = min(prospect.computed_len, _reusable_len(request))
        bound.matched_len = cached_len - cached_len % visit.worker.page_size

    def _start(self, bound: Bound) -> Placement:
        visit, decision = bound.visit, bound.decision
        visit.worker.reprice(visit, visit.prompt_len - bound.matched_len)
        visit.worker.move(visit, "prefill")
        self._num_placements[decision.reason] += 1
        return Placement(
            bound.request_id, decision.worker_id, bound.matched_len, decision.reason, decision.costs
        )

    def _prefilled(self, bound: Bound) -> None:
        visit, worker = bound.visit, bound.visit.worker
        self._tree.mark_computed(visit.tail, worker.worker_id)
        self._tree.add_queueing(
            visit.tail, worker.worker_id, self._now - bound.queued.submitted_at, self._now
        )
        worker.move(visit, "decode")

    def _wake_followers(self, leader: RequestId) -> None:
        """Look again, in the order of binding, at the requests that waited for `leader`."""
        for follower in self._in_order(self._holds.followers(leader)):
            self._hold_or_ready(follower)

    # Off a worker

    def _unbind(self, bound: Bound) -> None:
        """Take a request off its worker, which goes on without it."""
        visit = bound.visit
        self._tree.release(visit.tail, visit.worker.worker_id, bound.request_id)
        if visit.phase != "decode":
            self._window.drop(visit)  # nothing was computed
        visit.worker.move(visit, "done")
        self._window.close(visit)
        self._forget_bound(bound)
        self._wake_followers(bound.request_id)

    def _forget_bound(self, bound: Bound) -> None:
        del self._bound[bound.request_id]
        self._ready.pop(bound.request_id, None)
        self._holds.free(bound.request_id)

    def _requeue(self, returned: Iterable[Bound]) -> None:
        queue = [*self._queue.values(), *(bound.queued for bound in returned)]
        queue.sort(key=lambda queued: queued.number)
        self._queue = {queued.request.request_id: queued for queued in queue}

    # Looking up

    def _worker(self, worker_id: WorkerId) -> Worker:
        if worker_id not in self._workers:
            raise UnknownIdError(f"worker {worker_id} is not up")
        return self._workers[worker_id]

    def _sent(self, request_id: RequestId) -> Bound:
        """Return a request that its worker is working on."""
        bound = self._bound.get(request_id)
        if bound is None and request_id not in self._queue:
            raise _unknown_request(request_id)
        if bound is None or bound.visit.phase == "held":
            raise InputError(f"request {request_id} was not sent yet; dispatch returns it when it may start")
        return bound

    def _bound_to(self, worker: Worker) -> list[Bound]:
        """Return a worker's requests in the order of binding."""
        return self._in_order(rid for rid, bound in self._bound.items() if bound.visit.worker is worker)

    def _in_order(self, request_ids: Iterable[RequestId]) -> list[Bound]:
        return sorted((self._bound[rid] for rid in request_ids), key=lambda bound: bound.visit.number)

    def _list_open_workers(self) -> None:
        workers = sorted(self._workers.values(), key=lambda worker: worker.worker_id)
        self._open_workers = tuple(worker for worker in workers if not worker.is_draining)

    def _worker_snapshot(self, worker: Worker) -> WorkerSnapshot:
        return worker.snapshot(used_tokens=self._tree.used_tokens(worker.worker_id))

    # Time

    def _check_time(self, now: float) -> None:
        if not now >= self._now:
            raise InputError(f"now={now}: time ran backwards, the call before was at {self._now}")

    def _advance(self, now: float) -> None:
        """Move the clock and forget what is older than the window."""
        self._check_time(now)
        self._now = now
        self._window.advance(now)


def _reusable_len(request: Request) -> int:
    """Return how many prompt tokens a runtime can take from its cache.

    SGLang always computes the last one, and everything from the first one it has to score.
    """
    return (request.score_from or len(request.prompt)) - 1


def _unknown_request(request_id: RequestId) -> UnknownIdError:
    return UnknownIdError(f"request {request_id} is unknown or already finished")
