"""Runs calls on the runtimes where the global scheduler places them.

One event loop owns it. A call is submitted to the scheduler, starts on a runtime when the scheduler places
it, and comes back for placement, with the tokens that it has, when that runtime is lost or gives it up.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from preble_sgl.answering import Answering
from preble_sgl.attempts import Attempt, Generation, Outcome, Work
from preble_sgl.breaker import Breaker
from preble_sgl.core import (
    Completion,
    OnChunk,
    Placement,
    Request,
    RequestId,
    RequestRecord,
    TokenIds,
    WarmUp,
    WorkerId,
)
from preble_sgl.errors import NoWorkerError, PrebleError, RuntimeFaulty, RuntimeLost
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.scheduler import GlobalScheduler
from preble_sgl.runtime_ext.protocol import Runtime
from preble_sgl.runtime_ext.tasks import cancel_all
from preble_sgl.sim.wait_queue import Served, WaitOrder, wire_priority

OnRecord = Callable[[RequestRecord], None]

MAX_FRUITLESS = 10
"""Runtimes that a call may lose in a row without a token: by then it may be the call that kills them."""


@dataclass(slots=True, eq=False)
class _Call:
    """One request on its way: `answer` is what the caller waits for, `task` the attempt under way."""

    request: Request
    work: Work
    answer: "asyncio.Future[None]"
    submitted_at: float
    num_attempts: int = 0
    first_token_at: float = 0.0
    num_fruitless: int = 0
    task: "asyncio.Task[None] | None" = None
    worker_id: WorkerId | None = None
    has_token: bool = False
    is_assumed: bool = False
    has_faulted: bool = False

    @property
    def has_begun(self) -> bool:
        """Whether its prompt is computed, as far as we know."""
        return self.has_token or self.is_assumed


@dataclass(slots=True, eq=False)
class Dispatcher:
    """The calls under way and the runtimes that are up.

    `decode` gives the text of tokens. `on_lost` is told of a runtime whose connection broke off. `watched`:
    runtimes that somebody brings back when they are lost, so that calls wait for them. `on_faulty` is told of
    one that fails at everything, and for how many seconds it should be left alone.
    """

    scheduler: GlobalScheduler
    decode: Callable[[TokenIds], str]
    clock: Callable[[], float]
    on_record: OnRecord | None = None
    on_lost: Callable[[WorkerId], None] = lambda worker_id: None
    on_faulty: Callable[[WorkerId, float], None] = lambda worker_id, pause_s: None
    runtimes: dict[WorkerId, Runtime] = field(default_factory=dict)
    watched: set[WorkerId] = field(default_factory=set)
    _calls: dict[RequestId, _Call] = field(default_factory=dict)
    _tasks: "set[asyncio.Task[None]]" = field(default_factory=set)
    _warming: "dict[WorkerId, asyncio.Task[None]]" = field(default_factory=dict)
    _served: Served = field(default_factory=Served)
    _breaker: Breaker = field(default_factory=Breaker)

    # Runtimes

    def add(self, runtime: Runtime, profile: CostProfile) -> None:
        """Use a runtime, with an empty cache, from now on."""
        info = runtime.info
        self.scheduler.on_worker_up(
            info.worker_id,
            kv_tokens=info.kv_tokens,
            page_size=info.page_size,
            profile=profile,
            now=self.clock(),
        )
        self.runtimes[info.worker_id] = runtime

    def remove(self, worker_id: WorkerId) -> None:
        """Take a runtime out if it is in; the calls on it wait for placement again."""
        if self.runtimes.pop(worker_id, None) is not None:
            self.stop_warming(worker_id)
            for request_id in self.scheduler.on_worker_down(worker_id, self.clock()):
                self._end_attempt(self._calls[request_id])
        self.dispatch()

    def hand_over(self, worker_id: WorkerId, *, all_of_them: bool) -> None:
        """Give up calls that run on a worker, so that others go on with them.

        Unless `all_of_them`, only those that have no token yet.
        """
        for call in [call for call in self._on(worker_id) if all_of_them or not call.has_begun]:
            self.scheduler.on_hand_over(call.request.request_id, self.clock())
            self._end_attempt(call)
        self.dispatch()

    async def wait_idle(self, worker_id: WorkerId) -> None:
        """Wait until no call runs on a worker."""
        while running := [call.task for call in self._on(worker_id) if call.task]:
            await asyncio.wait(running)

    def num_running(self, worker_id: WorkerId) -> int:
        """Return how many calls run on a worker."""
        return len(self._on(worker_id))

    def _on(self, worker_id: WorkerId) -> list[_Call]:
        return [call for call in self._calls.values() if call.worker_id == worker_id]

    # Calls

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Place and run one request and return its answer; otherwise as `run`. Raises RequestRejected."""
        work = Generation(Answering(request, self.decode, on_chunk))
        await self.run(request, work)
        return work.answering.completion()

    async def run(self, request: Request, work: Work) -> None:
        """Do `work` where `request` is placed, on as many runtimes as it takes. Cancelling ends it there.

        Raises what `work` does, NoWorkerError when no runtime is left or watched, or RuntimeLost if it lost
        MAX_FRUITLESS of them.
        """
        now = self.clock()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call = _Call(request, work, answer, now)
        self.scheduler.submit(request, now)
        self._calls[request.request_id] = call
        try:
            self.dispatch()
            await answer
        finally:
            self._forget(call)

    def dispatch(self) -> None:
        """Start what the scheduler places now; fail what waits when no runtime is left or watched."""
        for placement in self.scheduler.dispatch(self.clock()):
            call = self._calls[placement.request_id]
            call.worker_id, call.has_token, call.is_assumed = placement.worker_id, False, False
            self.stop_warming(placement.worker_id)
            call.task = self._start(self._attempt(call, placement))
        if not self.runtimes and not self.watched:
            for call in self._calls.values():
                self._fail(call, NoWorkerError("every runtime of the fleet is lost"))

    async def close(self) -> None:
        """Give up every call, and wait until no attempt is under way any more."""
        await cancel_all(self._tasks)

    async def _attempt(self, call: _Call, placement: Placement) -> None:
        placed_at, num_before = self.clock(), call.work.num_tokens
        try:
            outcome = await call.work.run(self._prepared(call, placement))
        except Exception as error:
            if call.task is not asyncio.current_task():
                return  # it was taken from here, and only its clean-up failed
            if isinstance(error, RuntimeLost):
                self._survive(call, placement.worker_id, error, num_before)
            elif isinstance(error, RuntimeFaulty):
                self._try_again(call, placement.worker_id, error)
            else:
                self._fail(call, error)
        else:
            self._breaker.succeeded(placement.worker_id)
            self._finish(call, placement, placed_at, outcome)
        self.dispatch()

    def _prepared(self, call: _Call, placement: Placement) -> Attempt:
        call.num_attempts += 1
        runtime = self.runtimes[placement.worker_id]
        priority = self._priority(call.request, placement, runtime.info.wire_order)
        return Attempt(
            runtime,
            placement,
            call.request,
            priority,
            self.scheduler.expected_first_token_s(call.request.request_id),
            on_first_token=lambda: self._first_token(call),
            assume_first_token=lambda: self._assume_first_token(call),
        )

    def _first_token(self, call: _Call) -> None:
        if not call.has_token and call.worker_id is not None:
            self._assume_first_token(call)
            call.has_token, call.first_token_at = True, self.clock()

    def _assume_first_token(self, call: _Call) -> None:
        if not call.has_begun and call.worker_id is not None:
            call.is_assumed = True
            self.scheduler.on_first_token(call.request.request_id, self.clock())
            self.dispatch()

    def _priority(self, request: Request, placement: Placement, order: WaitOrder | None) -> int | None:
        if order is None:
            return None
        expected = request.expected_output_len
        return wire_priority(
            order,
            matched_len=placement.matched_len,
            total_len=len(request.prompt),
            served_len=self._served[request.program_id],
            expected_len=request.sampling.max_new_tokens if expected is None else expected,
        )

    def _survive(self, call: _Call, worker_id: WorkerId, error: RuntimeLost, num_before: int) -> None:
        """Let a call whose runtime was lost wait for another."""
        call.num_fruitless = 0 if call.work.num_tokens > num_before else call.num_fruitless + 1
        if call.num_fruitless >= MAX_FRUITLESS:
            self._fail(call, error)
        call.task = None
        self._lose(worker_id)

    def _try_again(self, call: _Call, worker_id: WorkerId, error: RuntimeFaulty) -> None:
        """Let a call at which a runtime failed be tried once more; leave alone one that always fails."""
        pause_s = self._breaker.failed(worker_id, call.request.request_id)
        if call.has_faulted:
            self._fail(call, error)
        else:
            self.scheduler.on_hand_over(call.request.request_id, self.clock())
            call.has_faulted, call.task, call.worker_id = True, None, None
        if pause_s is not None and worker_id in self.watched and len(self.runtimes) > 1:
            self.remove(worker_id)
            self.on_faulty(worker_id, pause_s)

    def _lose(self, worker_id: WorkerId) -> None:
        """Take out a runtime whose connection broke off, unless another call noticed first."""
        if worker_id in self.runtimes:
            self.remove(worker_id)
            self.on_lost(worker_id)

    def _finish(self, call: _Call, placement: Placement, placed_at: float, outcome: Outcome) -> None:
        if call.answer.done():  # given up while the last chunk was on its way
            return
        self._assume_first_token(call)
        now, usage = self.clock(), outcome.usage
        self.scheduler.on_finish(
            call.request.request_id,
            output=outcome.output_ids,
            cached_tokens=usage.cached_tokens,
            now=now,
            output_len=usage.output_tokens,
        )
        self._served.add(call.request.program_id, usage.computed_tokens + usage.output_tokens)
        if self.on_record:
            call.first_token_at = call.first_token_at if call.has_token else now
            self.on_record(_record(call, placement, outcome, placed_at, now))
        call.worker_id = None
        call.answer.set_result(None)

    def _fail(self, call: _Call, error: Exception) -> None:
        if not call.answer.done():
            self.scheduler.on_cancel(call.request.request_id, self.clock(), failed=True)
            call.worker_id = None
            call.answer.set_exception(error)

    def _forget(self, call: _Call) -> None:
        """Drop a call that was answered or given up; one given up is taken back from its runtime."""
        del self._calls[call.request.request_id]
        if call.answer.cancelled():
            self.scheduler.on_cancel(call.request.request_id, self.clock())
            self._end_attempt(call)
            self.dispatch()

    def _end_attempt(self, call: _Call) -> None:
        """Cancel what runs for a call, which aborts it on its runtime."""
        task, call.task, call.worker_id = call.task, None, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    # Warm-ups

    def warm(self, warm_up: WarmUp) -> None:
        """Compute a prefix on a worker ahead of use, until a call is placed there."""
        self.stop_warming(warm_up.worker_id)
        self._warming[warm_up.worker_id] = self._start(self._warm(warm_up))

    def stop_warming(self, worker_id: WorkerId) -> None:
        """Abort what is being computed ahead of use on a worker."""
        if task := self._warming.pop(worker_id, None):
            task.cancel()

    async def wait_warm(self, worker_id: WorkerId) -> None:
        """Wait until nothing is being computed ahead of use on a worker."""
        if task := self._warming.get(worker_id):
            await asyncio.wait([task])

    async def _warm(self, warm_up: WarmUp) -> None:
        is_computed = False
        try:
            async for _ in self.runtimes[warm_up.worker_id].stream(warm_up.request()):
                pass
            is_computed = True
        except PrebleError:
            pass  # the calls themselves will tell
        finally:
            self.scheduler.warming.done(warm_up, computed=is_computed)
            if self._warming.get(warm_up.worker_id) is asyncio.current_task():
                del self._warming[warm_up.worker_id]

    def _start(self, work: "asyncio._CoroutineLike[None]") -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _record(
    call: _Call,
    placement: Placement,
    outcome: Outcome,
    placed_at: float,
    now: float,
) -> RequestRecord:
    return RequestRecord(
        request_id=call.request.request_id,
        program_id=call.request.program_id,
        call_path=call.request.call_path,
        placement=placement,
        usage=outcome.usage,
        finish_reason=outcome.finish_reason,
        submitted_at=call.submitted_at,
        placed_at=placed_at,
        first_token_at=call.first_token_at,
        finished_at=now,
        num_attempts=call.num_attempts,
        tenant=call.request.tenant,
    )
