"""The global scheduler: which request goes to which worker, and when.

One object, driven by calls that say what happened and when (`now`, seconds on the caller's clock, never
backwards). It does no I/O and owns no clock, so the live fleet and the simulator run the same code.

    submit ─► queues ─► admission ─► policy ─► bind ─┬────────► ready ─► dispatch ─► prefill ─► ... ─► finish
              queues.py          placing.py          └─► held ──┘
                                                       bindings.py

The policy picks the worker. What else happens is the same for all policies that are given the same
`Mechanisms`, so that comparing two policies compares placement and nothing else. After any call that may let
a request start, call `dispatch`. A call that raises has changed nothing.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count

from preble_sgl.core import (
    CacheEvent,
    Placement,
    PlacementReason,
    PlanHint,
    ProgramId,
    Request,
    RequestId,
    TokenIds,
    WorkerId,
    WorkerLoad,
)
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.global_sched.admission import PLAIN, Mechanisms
from preble_sgl.global_sched.bindings import Bindings, Bound, Queued
from preble_sgl.global_sched.cache_feed import CacheFeed, FeedResult
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.fairness import FairShare
from preble_sgl.global_sched.placing import Placer
from preble_sgl.global_sched.policies.protocol import Observer, Policy
from preble_sgl.global_sched.programs import Programs
from preble_sgl.global_sched.queues import Queues
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.snapshot import SchedulerSnapshot, WorkerSnapshot
from preble_sgl.global_sched.tree_picture import PicturedNode, picture
from preble_sgl.global_sched.warming import Warming
from preble_sgl.global_sched.window import Window
from preble_sgl.global_sched.worker import OutputLengths, Worker


class GlobalScheduler:
    """Places requests on workers. Owns the prefix tree, the workers' loads and all unfinished requests."""

    def __init__(
        self,
        policy: Policy,
        *,
        rng: random.Random,
        window_s: float = 180.0,
        prefix_first: bool = True,
        mechanisms: Mechanisms = PLAIN,
    ) -> None:
        if not window_s > 0:
            raise InputError(f"window_s={window_s}: must be above 0")
        self._policy = policy
        self._observer = policy if isinstance(policy, Observer) else None
        self._now = float("-inf")
        self._numbers = count()
        self._tree = RadixTree(window_s)
        self._window = Window(window_s, self._tree)
        self._bindings = Bindings(self._tree, self._window, prefix_first=prefix_first)
        self._outputs = OutputLengths()
        self._workers: dict[WorkerId, Worker] = {}
        self._feeds: dict[WorkerId, CacheFeed] = {}
        self.warming = Warming(self._tree, self._workers)
        self._takes_requests = False
        self._programs = Programs()
        self._fair = FairShare()
        self._queues = Queues(depth_first=mechanisms.depth_first, short_first=mechanisms.short_first)
        self._placer = Placer(
            policy,
            mechanisms,
            rng=rng,
            tree=self._tree,
            bindings=self._bindings,
            programs=self._programs,
            queues=self._queues,
            fair=self._fair,
        )
        self._num_placements: Counter[PlacementReason] = Counter()

    # Workers

    def on_worker_up(
        self, worker_id: WorkerId, *, kv_tokens: int, page_size: int = 1, profile: CostProfile, now: float
    ) -> None:
        """Add a worker with an empty cache of `kv_tokens`. Raises InputError if it is up already."""
        self._check_time(now)
        self._tree.add_worker(worker_id, capacity=kv_tokens, page_size=page_size)
        self._advance(now)
        cache = self._tree.cache(worker_id)
        self._workers[worker_id] = Worker(worker_id, kv_tokens, page_size, profile, self._outputs, cache)
        self._feeds[worker_id] = CacheFeed(self._tree, worker_id, page_size)
        self._list_open_workers()

    def on_worker_drain(self, worker_id: WorkerId, now: float) -> None:
        """Place nothing more on a worker; it finishes what was sent to it. Raises UnknownIdError."""
        worker = self._worker(worker_id)
        self._advance(now)
        worker.is_draining = True
        self._queues.dissolve(worker)
        self._list_open_workers()
        unsent = [bound for bound in self._bindings.on_worker(worker) if bound.visit.phase == "held"]
        for bound in unsent:
            self._move_away(bound)

    def on_worker_down(self, worker_id: WorkerId, now: float) -> list[RequestId]:
        """Forget a worker; return the unfinished requests that were sent to it, in the order of sending.

        They are queued again where they stood, like those held for it. O(nodes + requests).
        Raises UnknownIdError.
        """
        worker = self._worker(worker_id)
        self._advance(now)
        self._queues.dissolve(worker)
        self._programs.forget_worker(worker_id)
        lost = self._bindings.lose(worker)
        self._window.forget_worker(worker_id)
        self._tree.forget_worker(worker_id)
        self.warming.forget(worker_id)
        del self._workers[worker_id], self._feeds[worker_id]
        self._list_open_workers()
        self._requeue(lost)
        if self._observer:
            self._observer.on_worker_gone(worker_id)
        return [bound.request_id for bound in lost if bound.visit.phase != "held"]

    def on_cache_cleared(self, worker_id: WorkerId, now: float) -> None:
        """Record that a worker has flushed its cache. O(nodes + requests). Raises UnknownIdError.

        Nothing is done while its runtime tells of its cache: it tells that too, and in the right order.
        """
        worker = self._worker(worker_id)
        self._advance(now)
        if self._feeds[worker_id].is_live:
            return
        self._tree.clear(worker_id)
        self._bindings.rebind(worker)

    def on_cache_events(
        self, worker_id: WorkerId, seq: int, events: Sequence[CacheEvent], now: float
    ) -> FeedResult:
        """Apply batch `seq` of what a runtime tells of its cache; `cache_feed.py` says how to go on.

        Raises UnknownIdError, or InputError if the batch cannot come from that runtime.
        """
        self._worker(worker_id)
        self._check_time(now)
        result = self._feeds[worker_id].receive(seq, events)
        self._advance(now)
        return result

    def on_load(self, worker_id: WorkerId, load: WorkerLoad, now: float) -> None:
        """Learn what a runtime does; what is not ours counts as its load, too. Raises UnknownIdError."""
        worker = self._worker(worker_id)
        self._advance(now)
        worker.on_load(load)

    def on_cache_feed_lost(self, worker_id: WorkerId, now: float) -> None:
        """Estimate a worker's cache until its events start afresh. O(nodes). Raises UnknownIdError."""
        self._worker(worker_id)
        self._advance(now)
        self._feeds[worker_id].lose()

    # Requests

    def submit(self, request: Request, now: float) -> None:
        """Queue a request. Raises InputError if its id belongs to an unfinished one."""
        request_id = request.request_id
        if request_id in self._queues or request_id in self._bindings:
            raise InputError(f"request {request_id} was submitted already; give every request its own id")
        self._check_time(now)
        self._programs.enter(request.program_id)
        self._advance(now)
        self._fair.enter(request.tenant)
        self._queues.put(Queued(request, request.prompt.tobytes(), next(self._numbers), now))

    def dispatch(self, now: float) -> list[Placement]:
        """Return what to send now, each request once: those no longer held, then new ones, each in order."""
        self._advance(now)
        if self._takes_requests and len(self._queues):
            self._placer.place(now)
        placements = self._bindings.start_ready()
        for placement in placements:
            self._num_placements[placement.reason] += 1
        return placements

    def on_first_token(self, request_id: RequestId, now: float) -> None:
        """Record that a prompt is computed, so that its followers may start.

        Raises UnknownIdError, or InputError if the request was not sent or had its first token before.
        """
        bound = self._sent(request_id)
        if bound.visit.phase == "decode":
            raise InputError(f"request {request_id} had its first token before; report it once")
        self._advance(now)
        self._first_token(bound)

    def expected_first_token_s(self, request_id: RequestId) -> float:
        """Return in how many seconds a sent request should have its first token: its worker prefills in turn.

        Raises UnknownIdError, or InputError if it was not sent.
        """
        return self._sent(request_id).visit.worker.pending_prefill_s

    def on_finish(
        self,
        request_id: RequestId,
        *,
        output: TokenIds,
        cached_tokens: int,
        now: float,
        output_len: int | None = None,
    ) -> None:
        """Record the end of a request, its output and the prompt tokens that its runtime found cached.

        The last output token was sampled and never run through the model: it has no KV. `output_len` for an
        output of which only the length is known.
        Raises UnknownIdError, or InputError if the request was not sent or `cached_tokens` is impossible.
        """
        bound = self._sent(request_id)
        if not 0 <= cached_tokens <= bound.visit.prompt_len:
            raise InputError(f"cached_tokens={cached_tokens}: the prompt has {bound.visit.prompt_len} tokens")
        self._advance(now)
        if bound.visit.phase == "prefill":
            self._first_token(bound)
        output_len = len(output) if output_len is None else output_len
        self._bindings.finish(bound, output, cached_tokens, output_len)
        visit = bound.visit
        if self._observer:
            worker_id = visit.worker.worker_id
            self._observer.on_finish(request_id, worker_id, cached_tokens, output_len, now)
        served_s = visit.prefill_s + visit.worker.profile.decode_s(output_len)
        self._fair.charge(bound.queued.request.tenant, served_s - bound.charged_s)
        self._leave(bound)

    def on_cancel(self, request_id: RequestId, now: float, *, failed: bool = False) -> None:
        """Forget a request, queued or running; `failed` if its runtime refused it. Raises UnknownIdError."""
        if request_id in self._bindings:
            self._advance(now)
            bound = self._bindings.unbind(request_id)
            if self._observer:
                self._observer.on_cancel(request_id, bound.visit.worker.worker_id, now, failed)
            self._leave(bound)
        elif request_id in self._queues:
            self._advance(now)
            meant_for = self._queues.backlog_of(request_id)
            if self._observer and meant_for is not None:
                self._observer.on_cancel(request_id, meant_for, now, failed)
            self._depart(self._queues.remove(request_id, self._workers).request)
        else:
            raise _unknown_request(request_id)

    def on_hand_over(self, request_id: RequestId, now: float) -> None:
        """Queue a sent request again where it stood, as its worker does not go on with it.

        Raises UnknownIdError, or InputError if it was not sent.
        """
        bound = self._sent(request_id)
        self._advance(now)
        self._move_away(bound)

    # Programs

    def register_plan(self, plan: PlanHint, now: float) -> None:
        """Learn what a program is going to do. It stays known until it is released.

        Raises InputError if the program already made a call or has a plan.
        """
        self._check_time(now)
        self._programs.register(plan)
        self._advance(now)

    def release_program(self, program_id: ProgramId, now: float) -> None:
        """Record that a planned program makes no more calls. Raises UnknownIdError."""
        self._check_time(now)
        self._programs.release(program_id)
        self._advance(now)
        self._placer.may_admit = True

    def on_branch_done(self, program_id: ProgramId, num_tokens: int, now: float) -> None:
        """Record that a planned program will not use `num_tokens` of its KV again. Raises UnknownIdError."""
        self._check_time(now)
        run = self._programs.planned(program_id)
        self._advance(now)
        if run.planned_tokens is not None:
            self._programs.give_back(run, num_tokens)
            self._placer.may_admit = True

    def on_pause(self, program_id: ProgramId, expected_s: float, now: float) -> None:
        """Record that a planned program waits, for a tool say, for about `expected_s` seconds.

        Its KV room is kept if the pause is worth it, else it is given to others and the program has to be
        admitted again. Raises UnknownIdError.
        """
        self._check_time(now)
        run = self._programs.planned(program_id)
        self._advance(now)
        self._placer.pause(run, expected_s)

    # Reading

    @property
    def num_queued(self) -> int:
        """Requests that are not bound to a worker."""
        return len(self._queues)

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
            num_waiting=self._queues.num_waiting,
            num_open_programs=self._programs.num_open,
            num_nodes=self._tree.num_nodes,
            workers=tuple(self._worker_snapshot(worker) for worker in self._workers.values()),
            num_placements=dict(self._num_placements),
            cache_feeds={worker_id: feed.snapshot() for worker_id, feed in self._feeds.items()},
        )

    def picture(self, most: int) -> list[PicturedNode]:
        """Return the largest `most` nodes of the prefix tree, for people to look at. O(nodes)."""
        return picture(self._tree.trie.roots(), most)

    def check_invariants(self) -> None:
        """Assert that tree, window, loads, queue and holds agree. O(nodes + requests)."""
        self._tree.check_invariants()
        self._bindings.check_invariants(self._workers.values())
        self._queues.check_invariants(self._workers)
        self._programs.check_invariants()
        unfinished = sum(run.num_unfinished for run in self._programs)
        assert unfinished == len(self._queues) + len(self._bindings)

    # Leaving

    def _first_token(self, bound: Bound) -> None:
        queueing_s = self._bindings.first_token(bound, self._now)
        if self._observer:
            worker_id = bound.visit.worker.worker_id
            self._observer.on_first_token(bound.request_id, worker_id, queueing_s, self._now)

    def _leave(self, bound: Bound) -> None:
        """Let go of a request that had a worker."""
        self._take_back(bound)
        self._depart(bound.queued.request)

    def _take_back(self, bound: Bound) -> None:
        """Take back the KV room that was promised for a request."""
        run = self._programs[bound.queued.program_id]
        worker_id = bound.visit.worker.worker_id
        if worker_id in run.promised:
            self._programs.promise(run, worker_id, -bound.promised_len)
        self._placer.may_admit = True

    def _depart(self, request: Request) -> None:
        self._programs.leave(request.program_id)
        self._fair.leave(request.tenant)
        self._placer.may_admit = True

    def _move_away(self, bound: Bound) -> None:
        """Take a request off its worker and queue it again."""
        if self._observer:
            self._observer.on_cancel(bound.request_id, bound.visit.worker.worker_id, self._now, False)
        self._requeue([self._bindings.unbind(bound.request_id)])

    def _requeue(self, returned: Iterable[Bound]) -> None:
        back = list(returned)
        for bound in back:
            self._take_back(bound)
            self._fair.charge(bound.queued.request.tenant, -bound.charged_s)
        self._queues.put_back(bound.queued for bound in back)

    # Looking up

    def _worker(self, worker_id: WorkerId) -> Worker:
        if worker_id not in self._workers:
            raise UnknownIdError(f"worker {worker_id} is not up")
        return self._workers[worker_id]

    def _sent(self, request_id: RequestId) -> Bound:
        if request_id not in self._bindings and request_id not in self._queues:
            raise _unknown_request(request_id)
        return self._bindings.sent(request_id)

    def _list_open_workers(self) -> None:
        workers = sorted(self._workers.values(), key=lambda worker: worker.worker_id)
        open_workers = tuple(worker for worker in workers if not worker.is_draining)
        self._takes_requests = bool(open_workers)
        self._placer.use(open_workers)

    def _worker_snapshot(self, worker: Worker) -> WorkerSnapshot:
        return worker.snapshot(used_tokens=self._tree.used_tokens(worker.worker_id))

    # Time

    def _check_time(self, now: float) -> None:
        if not now >= self._now:
            raise InputError(f"now={now}: time ran backwards, the call before was at {self._now}")

    def _advance(self, now: float) -> None:
        """Move the clock and forget what is older than the window."""
        if now != self._now:
            self._check_time(now)
            self._now = now
            self._window.advance(now)


def _unknown_request(request_id: RequestId) -> UnknownIdError:
    return UnknownIdError(f"request {request_id} is unknown or already finished")
