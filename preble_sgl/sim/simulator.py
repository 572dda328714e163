"""A fleet in virtual time: the global scheduler of the live fleet, over models of runtimes.

    submit ─► GlobalScheduler ─► placement ─► (overhead) ─► Engine: start ─► its end ─► finish ─► scheduler

Only the clock and the runtimes differ from the live fleet. Nothing waits for real time, so a run is as fast
as Python is, and the same seeds give the same run on every machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from preble_sgl.core import (
    Placement,
    PlanHint,
    ProgramId,
    Request,
    RequestId,
    RequestRecord,
    TokenIds,
    WarmUp,
    WorkerId,
    token_ids,
)
from preble_sgl.errors import RequestRejected
from preble_sgl.global_sched.cost import CostProfile, with_shared_prefix
from preble_sgl.global_sched.scheduler import GlobalScheduler
from preble_sgl.profiles import Profile
from preble_sgl.sim.engine import Engine
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.jobs import Finished
from preble_sgl.sim.virtual_time import Clock, Timer

OnEnd = Callable[["RequestRecord | RequestRejected"], None]
"""What to do when a request has ended, well or not."""


@dataclass(frozen=True, slots=True)
class SimWorker:
    """A worker to simulate: its profile, and how its runtime is set.

    `told_of_sharing`: the scheduler knows whether its decode steps read a shared prefix once.
    """

    worker_id: WorkerId
    profile: Profile
    config: EngineConfig
    told_of_sharing: bool = True

    @classmethod
    def of(
        cls, worker_id: str, profile: Profile, *, told_of_sharing: bool = True, **settings: object
    ) -> "SimWorker":
        """Return a worker with a profile's cache and chunks, and other engine `settings`."""
        defaults = {"kv_tokens": profile.kv_tokens, "chunk_tokens": profile.chunk_tokens}
        config = EngineConfig(step=profile.step, **defaults | settings)  # type: ignore[arg-type]
        return cls(WorkerId(worker_id), profile, config, told_of_sharing)

    @property
    def cost(self) -> CostProfile:
        """What the scheduler believes that work costs there."""
        cost = self.profile.cost
        return with_shared_prefix(cost) if self.config.shared_prefix and self.told_of_sharing else cost

    def named(self, worker_id: str) -> "SimWorker":
        """Return the same worker under another id."""
        return replace(self, worker_id=WorkerId(worker_id))


@dataclass(slots=True, eq=False)
class _Runtime:
    """An engine, when its iteration ends, and how long it has computed. `starts`: it is about to start."""

    worker_id: WorkerId
    engine: Engine
    overhead_s: float
    timer: Timer | None = None
    starts: bool = False
    next_seq: int = 0
    busy_s: float = 0.0
    started_at: float = 0.0
    ends_at: float = 0.0
    warming: tuple[RequestId, WarmUp] | None = None


@dataclass(slots=True, eq=False)
class _Call:
    request: Request
    output: TokenIds
    on_end: OnEnd
    submitted_at: float
    placement: Placement | None = None
    placed_at: float = 0.0


class SimulatedFleet:
    """A scheduler and its simulated runtimes. `clock` decides when what happens; see `virtual_time`."""

    def __init__(self, scheduler: GlobalScheduler, workers: Sequence[SimWorker], clock: Clock) -> None:
        self.scheduler = scheduler
        self._clock = clock
        self._calls: dict[RequestId, _Call] = {}
        self._workers = {worker.worker_id: worker for worker in workers}
        self._runtimes: dict[WorkerId, _Runtime] = {}
        for worker_id in self._workers:
            self._bring_up(worker_id)

    def submit(self, request: Request, output: TokenIds, on_end: OnEnd) -> None:
        """Make a call that will generate `output`, cut to what it asks for; `on_end` is told of its end."""
        now = self._clock.time()
        self._calls[request.request_id] = _Call(request, output, on_end, now)
        self.scheduler.submit(request, now)
        self._dispatch()

    def cancel(self, request_id: RequestId) -> None:
        """Give up a call; its `on_end` is not told. Raises UnknownIdError."""
        self.scheduler.on_cancel(request_id, self._clock.time())
        call = self._calls.pop(request_id)
        if call.placement is not None:
            runtime = self._runtimes[call.placement.worker_id]
            if runtime.engine.abort(request_id):
                self._heed(runtime)
        self._dispatch()

    def begin_program(self, hint: PlanHint) -> None:
        """Tell the scheduler that a program run begins, and what is known of it."""
        self.scheduler.register_plan(hint, self._clock.time())

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Tell the scheduler that a program run will not use so many tokens of its KV again."""
        self.scheduler.on_branch_done(program_id, num_tokens, self._clock.time())
        self._dispatch()

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Tell the scheduler that a program run waits for about so long."""
        self.scheduler.on_pause(program_id, expected_s, self._clock.time())
        self._dispatch()

    def end_program(self, program_id: ProgramId) -> None:
        """Tell the scheduler that a program run makes no more calls."""
        self.scheduler.release_program(program_id, self._clock.time())
        self._dispatch()

    def restart(self, worker_id: WorkerId, down_s: float = 0.0) -> None:
        """Lose a runtime and have it back, with an empty cache, after a while; its calls run again."""
        runtime = self._runtimes.pop(worker_id)
        if runtime.timer:
            runtime.timer.cancel()
        for request_id in self.scheduler.on_worker_down(worker_id, self._clock.time()):
            self._calls[request_id].placement = None
        self._clock.call_at(self._clock.time() + down_s, self._come_back, worker_id)
        self._dispatch()

    def warm_up(self) -> None:
        """Let idle runtimes compute what the scheduler proposes, until a call is placed there."""
        for warm_up in self.scheduler.warming.propose():
            runtime = self._runtimes[warm_up.worker_id]
            request = warm_up.request()
            runtime.warming = request.request_id, warm_up
            runtime.engine.submit(request, token_ids(), self._clock.time())
            self._heed(runtime)

    @property
    def busy_s(self) -> dict[WorkerId, float]:
        """Seconds that each runtime has computed."""
        return {worker_id: runtime.busy_s for worker_id, runtime in self._runtimes.items()}

    def check_invariants(self) -> None:
        """Assert, between iterations of all engines, that scheduler and engines are in order."""
        self.scheduler.check_invariants()
        for runtime in self._runtimes.values():
            runtime.engine.check_invariants()

    def _bring_up(self, worker_id: WorkerId) -> None:
        worker = self._workers[worker_id]
        self._runtimes[worker_id] = _Runtime(worker_id, Engine(worker.config), worker.profile.overhead_s)
        self.scheduler.on_worker_up(
            worker_id,
            kv_tokens=worker.config.kv_tokens,
            page_size=worker.config.page_size,
            profile=worker.cost,
            now=self._clock.time(),
        )

    def _come_back(self, worker_id: WorkerId) -> None:
        self._bring_up(worker_id)
        self._dispatch()

    def _dispatch(self) -> None:
        now = self._clock.time()
        for placement in self.scheduler.dispatch(now):
            call = self._calls[placement.request_id]
            call.placement, call.placed_at = placement, now
            runtime = self._runtimes[placement.worker_id]
            self._stop_warming(runtime, computed=False)
            if runtime.overhead_s:
                self._clock.call_at(now + runtime.overhead_s, self._arrive, runtime, call)
            else:
                self._arrive(runtime, call)

    def _arrive(self, runtime: _Runtime, call: _Call) -> None:
        """Let a request enter its runtime's wait queue, unless it was given up on the way."""
        request_id = call.request.request_id
        is_here = self._runtimes.get(runtime.worker_id) is runtime
        if self._calls.get(request_id) is not call or not is_here:
            return
        try:
            runtime.engine.submit(call.request, call.output, self._clock.time())
        except RequestRejected as error:
            self._reject(call, error)
        else:
            self._heed(runtime)

    def _reject(self, call: _Call, error: RequestRejected) -> None:
        request_id = call.request.request_id
        del self._calls[request_id]
        self.scheduler.on_cancel(request_id, self._clock.time(), failed=True)
        call.on_end(error)
        self._dispatch()

    def _heed(self, runtime: _Runtime) -> None:
        """Let a runtime see what came: start if it is idle, or shorten the stretch it is in."""
        now = self._clock.time()
        if not runtime.engine.is_running:
            if not runtime.starts:  # after whatever else happens in this instant
                runtime.starts = True
                self._clock.call_at(now, self._start, runtime)
            return
        assert runtime.timer is not None
        ends_at, before = runtime.engine.cut(now), runtime.ends_at
        if ends_at != before:
            runtime.timer.cancel()
            self._end_at(runtime, ends_at)

    def _stop_warming(self, runtime: _Runtime, *, computed: bool) -> None:
        if runtime.warming is not None:
            request_id, warm_up = runtime.warming
            runtime.warming = None
            if not computed:
                runtime.engine.abort(request_id)
            self.scheduler.warming.done(warm_up, computed=computed)

    def _start(self, runtime: _Runtime) -> None:
        runtime.starts = False
        if self._runtimes.get(runtime.worker_id) is not runtime:
            return
        if not runtime.engine.is_running:
            runtime.started_at = self._clock.time()
            ends_at = runtime.engine.start(runtime.started_at)
            if ends_at is not None:
                self._end_at(runtime, ends_at)

    def _end_at(self, runtime: _Runtime, ends_at: float) -> None:
        runtime.ends_at = ends_at
        runtime.timer = self._clock.call_at(ends_at, self._end, runtime)

    def _end(self, runtime: _Runtime) -> None:
        """Finish an iteration, tell the scheduler what it brought, and start the next."""
        now = self._clock.time()
        result = runtime.engine.finish()
        runtime.busy_s += now - runtime.started_at
        for request_id in result.first_tokens:
            self.scheduler.on_first_token(request_id, now)
        calls = [finished for finished in result.finished if finished.request_id in self._calls]
        if len(calls) < len(result.finished):
            self._stop_warming(runtime, computed=True)
        ended = [self._finish(finished, now) for finished in calls]
        if result.events:
            self.scheduler.on_cache_events(runtime.worker_id, runtime.next_seq, result.events, now)
            runtime.next_seq += 1
        for call, record in ended:
            call.on_end(record)
        self._dispatch()
        self._start(runtime)

    def _finish(self, finished: Finished, now: float) -> tuple[_Call, RequestRecord]:
        call = self._calls.pop(finished.request_id)
        assert call.placement is not None
        usage = finished.usage
        self.scheduler.on_finish(
            finished.request_id,
            output=call.output[: usage.output_tokens],
            cached_tokens=usage.cached_tokens,
            now=now,
        )
        return call, RequestRecord(
            request_id=finished.request_id,
            program_id=call.request.program_id,
            call_path=call.request.call_path,
            placement=call.placement,
            usage=usage,
            finish_reason=finished.finish_reason,
            submitted_at=call.submitted_at,
            placed_at=call.placed_at,
            first_token_at=now if finished.first_token_at is None else finished.first_token_at,
            finished_at=now,
        )
