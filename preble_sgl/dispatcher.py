"""Runs calls on the runtimes where the global scheduler places them.

One event loop owns it. A call is submitted to the scheduler, starts on a runtime when the scheduler places
it, and comes back for placement, with the tokens that it has, when that runtime is lost or gives it up.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from preble_sgl.answering import Answering
from preble_sgl.core import (
    Completion,
    OnChunk,
    Placement,
    ProgramId,
    Request,
    RequestId,
    RequestRecord,
    SamplingParams,
    TokenIds,
    WarmUp,
    WorkerId,
    new_request_id,
)
from preble_sgl.errors import NoWorkerError, PrebleError, RuntimeLost
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.scheduler import GlobalScheduler
from preble_sgl.runtime_ext.protocol import Runtime
from preble_sgl.sim.wait_queue import Served, wire_priority

OnRecord = Callable[[RequestRecord], None]

MAX_FRUITLESS = 10
"""Runtimes that a call may lose in a row without a token: by then it may be the call that kills them."""


@dataclass(slots=True, eq=False)
class _Call:
    """One request on its way: `answer` is what the caller waits for, `task` the attempt under way."""

    request: Request
    answering: Answering
    answer: "asyncio.Future[Completion]"
    submitted_at: float
    num_fruitless: int = 0
    task: "asyncio.Task[None] | None" = None
    worker_id: WorkerId | None = None
    has_token: bool = False


@dataclass(slots=True, eq=False)
class Dispatcher:
    """The calls under way and the runtimes that are up.

    `decode` gives the text of tokens. `on_lost` is told of a runtime whose connection broke off. `watched`:
    runtimes that somebody brings back when they are lost, so that calls wait for them.
    """

    scheduler: GlobalScheduler
    decode: Callable[[TokenIds], str]
    clock: Callable[[], float]
    on_record: OnRecord | None = None
    on_lost: Callable[[WorkerId], None] = lambda worker_id: None
    runtimes: dict[WorkerId, Runtime] = field(default_factory=dict)
    watched: set[WorkerId] = field(default_factory=set)
    _calls: dict[RequestId, _Call] = field(default_factory=dict)
    _tasks: "set[asyncio.Task[None]]" = field(default_factory=set)
    _warming: "dict[WorkerId, asyncio.Task[None]]" = field(default_factory=dict)
    _served: Served = field(default_factory=Served)

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

    def hand_over(self, worker_id: WorkerId, *, all_of_them: bool) -> int:
        """Give up calls that run on a worker, so that others go on with them; return how many.

        Unless `all_of_them`, only those that have no token yet.
        """
        moving = [call for call in self._on(worker_id) if all_of_them or not call.has_token]
        for call in moving:
            self.scheduler.on_hand_over(call.request.request_id, self.clock())
            self._end_attempt(call)
        self.dispatch()
        return len(moving)

    async def wait_idle(self, worker_id: WorkerId) -> None:
        """Wait until no call runs on a worker."""
        while running := [call.task for call in self._on(worker_id) if call.task]:
            await asyncio.wait(running)

    def num_running(self, worker_id: WorkerId) -> int:
        """Return how many calls run on a worker."""
        return sum(1 for _ in self._on(worker_id))

    def _on(self, worker_id: WorkerId) -> Iterable[_Call]:
        return [call for call in self._calls.values() if call.worker_id == worker_id]

    # Calls

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Place and run one request, on as many runtimes as it takes. Cancelling aborts it on its runtime.

        Raises RequestRejected, NoWorkerError when no runtime is left or watched, or RuntimeLost if it lost
        MAX_FRUITLESS of them.
        """
        now = self.clock()
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        call = _Call(request, Answering(request, self.decode, on_chunk), answer, now)
        self.scheduler.submit(request, now)
        self._calls[request.request_id] = call
        try:
            self.dispatch()
            return await answer
        finally:
            self._forget(call)

    def dispatch(self) -> None:
        """Start what the scheduler places now; fail what waits when no runtime is left or watched."""
        for placement in self.scheduler.dispatch(self.clock()):
            call = self._calls[placement.request_id]
            call.worker_id, call.has_token = placement.worker_id, False
            self.stop_warming(placement.worker_id)
            call.task = self._start(self._attempt(call, placement))
        if not self.runtimes and not self.watched:
            for call in self._calls.values():
                self._fail(call, NoWorkerError("every runtime of the fleet is lost"))

    async def close(self) -> None:
        """Give up every call, and wait until no attempt is under way any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _attempt(self, call: _Call, placement: Placement) -> None:
        placed_at, num_before = self.clock(), call.answering.num_tokens
        try:
            first_token_at = await self._stream(call, placement)
        except Exception as error:
            if call.task is not asyncio.current_task():
                return  # it was taken from here, and only its clean-up failed
            if isinstance(error, RuntimeLost):
                self._survive(call, placement.worker_id, error, num_before)
            else:
                self._fail(call, error)
        else:
            self._finish(call, placement, placed_at, first_token_at)
        self.dispatch()

    async def _stream(self, call: _Call, placement: Placement) -> float:
        """Run one attempt to its end; return when its first token came."""
        request = self._prioritised(call.answering.next_request(), placement)
        first_token_at: float | None = None
        async for chunk in self.runtimes[placement.worker_id].stream(request):
            call.answering.take(chunk)
            if first_token_at is None:
                first_token_at = self.clock()
                call.has_token = True
                self.scheduler.on_first_token(call.request.request_id, first_token_at)
                self.dispatch()
        assert first_token_at is not None, "a stream has at least one chunk"
        return first_token_at

    def _prioritised(self, request: Request, placement: Placement) -> Request:
        """Return a request with the priority that makes a stock runtime keep our order, as far as it can."""
        order = self.runtimes[placement.worker_id].info.wire_order
        if order is None:
            return request
        expected = request.expected_output_len
        priority = wire_priority(
            order,
            matched_len=placement.matched_len,
            total_len=len(request.prompt),
            served_len=self._served[request.program_id],
            expected_len=request.sampling.max_new_tokens if expected is None else expected,
        )
        return replace(request, priority=priority)

    def _survive(self, call: _Call, worker_id: WorkerId, error: RuntimeLost, num_before: int) -> None:
        """Let a call whose runtime was lost wait for another."""
        call.num_fruitless = 0 if call.answering.num_tokens > num_before else call.num_fruitless + 1
        if call.num_fruitless >= MAX_FRUITLESS:
            self._fail(call, error)
        call.task = None
        self.lose(worker_id)

    def lose(self, worker_id: WorkerId) -> None:
        """Take out a runtime whose connection broke off, unless another call noticed first."""
        if worker_id in self.runtimes:
            self.remove(worker_id)
            self.on_lost(worker_id)

    def _finish(self, call: _Call, placement: Placement, placed_at: float, first_token_at: float) -> None:
        if call.answer.done():  # given up while the last chunk was on its way
            return
        now, completion = self.clock(), call.answering.completion()
        self.scheduler.on_finish(
            call.request.request_id,
            output=completion.output_ids,
            cached_tokens=completion.usage.cached_tokens,
            now=now,
        )
        usage = completion.usage
        self._served.add(call.request.program_id, usage.computed_tokens + usage.output_tokens)
        if self.on_record:
            self.on_record(_record(call, placement, completion, placed_at, first_token_at, now))
        call.worker_id = None
        call.answer.set_result(completion)

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
            async for _ in self.runtimes[warm_up.worker_id].stream(_warming_request(warm_up)):
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
    completion: Completion,
    placed_at: float,
    first_token_at: float,
    now: float,
) -> RequestRecord:
    return RequestRecord(
        request_id=call.request.request_id,
        program_id=call.request.program_id,
        call_path=call.request.call_path,
        placement=placement,
        usage=completion.usage,
        finish_reason=completion.finish_reason,
        submitted_at=call.submitted_at,
        placed_at=placed_at,
        first_token_at=first_token_at,
        finished_at=now,
        num_attempts=call.answering.num_attempts,
    )


def _warming_request(warm_up: WarmUp) -> Request:
    return Request(
        request_id=new_request_id(),
        program_id=ProgramId("warm-up"),
        call_path="warm-up",
        prompt=warm_up.prefix,
        namespace=warm_up.namespace,
        sampling=SamplingParams(max_new_tokens=0),
    )
