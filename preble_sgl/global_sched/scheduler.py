"""The global scheduler: which request goes to which worker, and when.

One object, driven by calls that say what happened and when (`now`, seconds on the caller's clock, never
backwards). It does no I/O and owns no clock, so the live fleet and the simulator run the same code.

    submit ─► queue ─► match, choose, bind ─┬────────► ready ─► dispatch ─► prefill ─► decode ─► finish
                                            └─► held ──┘
                                               (bindings.py)

The policy picks the worker; everything else is the same for all policies, so that comparing two policies
compares placement and nothing else. After any call that may let a request start, call `dispatch`. A call
that raises has changed nothing.
"""

import random
from collections import Counter
from collections.abc import Iterable
from itertools import count

from preble_sgl.core import Placement, PlacementReason, Request, RequestId, TokenIds, WorkerId
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched.bindings import Bindings, Bound, Queued
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.protocol import Decision, FleetView, Policy
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.snapshot import SchedulerSnapshot, WorkerSnapshot
from preble_sgl.global_sched.window import Window
from preble_sgl.global_sched.worker import OutputLengths, Worker


class GlobalScheduler:
    """Places requests on workers. Owns the prefix tree, the workers' loads and all unfinished requests."""

    def __init__(
        self, policy: Policy, *, rng: random.Random, window_s: float = 180.0, prefix_first: bool = True
    ) -> None:
        if not window_s > 0:
            raise InputError(f"window_s={window_s}: must be above 0")
        self._policy = policy
        self._rng = rng
        self._now = float("-inf")
        self._numbers = count()
        self._tree = RadixTree(window_s)
        self._window = Window(window_s, self._tree)
        self._bindings = Bindings(self._tree, self._window, prefix_first=prefix_first)
        self._outputs = OutputLengths()
        self._workers: dict[WorkerId, Worker] = {}
        self._open_workers: tuple[Worker, ...] = ()
        self._queue: dict[RequestId, Queued] = {}
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
        unsent = [bound for bound in self._bindings.on_worker(worker) if bound.visit.phase == "held"]
        self._requeue(self._bindings.unbind(bound.request_id) for bound in unsent)

    def on_worker_down(self, worker_id: WorkerId, now: float) -> list[RequestId]:
        """Forget a worker; return the unfinished requests that were sent to it, in the order of sending.

        They are queued again where they stood, like those held for it. O(nodes + requests).
        Raises UnknownIdError.
        """
        worker = self._worker(worker_id)
        self._advance(now)
        lost = self._bindings.lose(worker)
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
        self._bindings.rebind(worker)

    # Requests

    def submit(self, request: Request, now: float) -> None:
        """Queue a request. Raises InputError if its id belongs to an unfinished one."""
        request_id = request.request_id
        if request_id in self._queue or request_id in self._bindings:
            raise InputError(f"request {request_id} was submitted already; give every request its own id")
        self._advance(now)
        self._queue[request_id] = Queued(request, request.prompt.tobytes(), next(self._numbers), now)

    def dispatch(self, now: float) -> list[Placement]:
        """Return what to send now, each request once: those no longer held, then new ones, each in order."""
        self._advance(now)
        if self._open_workers and self._queue:
            fleet = FleetView(self._open_workers, self._tree, now, self._rng)
            for queued in self._queue.values():
                self._bind(queued, fleet)
            self._queue.clear()
        placements = self._bindings.start_ready()
        self._num_placements.update(placement.reason for placement in placements)
        return placements

    def on_first_token(self, request_id: RequestId, now: float) -> None:
        """Record that a prompt is computed, so that its followers may start.

        Raises UnknownIdError, or InputError if the request was not sent or had its first token before.
        """
        bound = self._sent(request_id)
        if bound.visit.phase == "decode":
            raise InputError(f"request {request_id} had its first token before; report it once")
        self._advance(now)
        self._bindings.first_token(bound, now)

    def on_finish(self, request_id: RequestId, *, output: TokenIds, cached_tokens: int, now: float) -> None:
        """Record the end of a request, its output and the prompt tokens that its runtime found cached.

        The last output token was sampled and never run through the model: it has no KV.
        Raises UnknownIdError, or InputError if the request was not sent or `cached_tokens` is impossible.
        """
        bound = self._sent(request_id)
        if not 0 <= cached_tokens <= bound.visit.prompt_len:
            raise InputError(f"cached_tokens={cached_tokens}: the prompt has {bound.visit.prompt_len} tokens")
        self._advance(now)
        if bound.visit.phase == "prefill":
            self._bindings.first_token(bound, now)
        self._bindings.finish(bound, output, cached_tokens)

    def on_cancel(self, request_id: RequestId, now: float) -> None:
        """Forget a request, queued or running. Raises UnknownIdError."""
        if request_id not in self._queue and request_id not in self._bindings:
            raise _unknown_request(request_id)
        self._advance(now)
        if self._queue.pop(request_id, None) is None:
            self._bindings.unbind(request_id)

    # Reading

    @property
    def num_queued(self) -> int:
        """Requests without a worker."""
        return len(self._queue)

    @property
    def num_held(self) -> int:
        """Requests with a worker that `dispatch` has not returned yet."""
        return self._bindings.num_held

    @property
    def num_running(self) -> int:
        """Requests that were sent and are not finished."""
        return len(self._bindings) - self.num_held

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
        self._bindings.check_invariants(self._workers.values())
        assert not any(request_id in self._bindings for request_id in self._queue)
        numbers = [queued.number for queued in self._queue.values()]
        assert numbers == sorted(numbers)

    # Placing

    def _bind(self, queued: Queued, fleet: FleetView) -> None:
        match = self._bindings.match(queued)
        decision = self._choose(queued.request, match, fleet)
        worker = self._workers[decision.worker_id]
        assert not worker.is_draining, f"{self._policy.name} chose a worker that takes nothing new"
        self._bindings.bind(queued, worker, match, decision, fleet.now)

    def _choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        if len(fleet.workers) == 1:
            return Decision(fleet.workers[0].worker_id, "only_worker")
        return self._policy.choose(request, match, fleet)

    def _requeue(self, returned: Iterable[Bound]) -> None:
        queue = [*self._queue.values(), *(bound.queued for bound in returned)]
        queue.sort(key=lambda queued: queued.number)
        self._queue = {queued.request_id: queued for queued in queue}

    # Looking up

    def _worker(self, worker_id: WorkerId) -> Worker:
        if worker_id not in self._workers:
            raise UnknownIdError(f"worker {worker_id} is not up")
        return self._workers[worker_id]

    def _sent(self, request_id: RequestId) -> Bound:
        if request_id not in self._bindings and request_id not in self._queue:
            raise _unknown_request(request_id)
        return self._bindings.sent(request_id)

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


def _unknown_request(request_id: RequestId) -> UnknownIdError:
    return UnknownIdError(f"request {request_id} is unknown or already finished")
