"""The live composition root: programs' calls in, the global scheduler's placements out to runtimes.

One event loop owns a fleet and everything in it. A call is submitted to the scheduler, starts on a
runtime when the scheduler places it, and comes back for placement when that runtime is lost.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from anyio.from_thread import BlockingPortal

from preble_sgl.core import (
    Chunk,
    Completion,
    OnChunk,
    Placement,
    PlanHint,
    ProgramId,
    Request,
    RequestId,
    RequestRecord,
    WorkerId,
    token_ids,
)
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.plan import Plan
from preble_sgl.errors import InputError, NoWorkerError, RuntimeLost
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.make import check_name, make_scheduler
from preble_sgl.machine import launch_specs, profile_of
from preble_sgl.opening import Opening
from preble_sgl.predict import Prediction, WorkerSpec, predict
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launcher import launch_runtimes
from preble_sgl.runtime_ext.protocol import Runtime

T = TypeVar("T")
OnRecord = Callable[[RequestRecord], None]

DEFAULT_POLICY = "preble_e2"


@dataclass(slots=True)
class _Call:
    """One request on its way: `answer` is what the caller waits for, `task` the attempt under way."""

    request: Request
    answer: "asyncio.Future[Completion]"
    submitted_at: float
    on_chunk: OnChunk | None = None
    num_attempts: int = 0
    task: "asyncio.Task[None] | None" = None


@dataclass(slots=True)
class _Attempt:
    """What one attempt has streamed so far."""

    placement: Placement
    placed_at: float
    first_token_at: float | None = None
    chunks: list[Chunk] = field(default_factory=list)

    def completion(self) -> Completion:
        last = self.chunks[-1]
        assert last.finish_reason is not None, "a stream ends with a finish reason"
        ids = token_ids(token for chunk in self.chunks for token in chunk.output_ids)
        text = "".join(chunk.text for chunk in self.chunks)
        return Completion(ids, text, last.finish_reason, last.usage, last.logprobs, last.output_logprobs)

    def record(self, call: _Call, completion: Completion, now: float) -> RequestRecord:
        assert self.first_token_at is not None
        return RequestRecord(
            request_id=call.request.request_id,
            program_id=call.request.program_id,
            call_path=call.request.call_path,
            placement=self.placement,
            usage=completion.usage,
            finish_reason=completion.finish_reason,
            submitted_at=call.submitted_at,
            placed_at=self.placed_at,
            first_token_at=self.first_token_at,
            finished_at=now,
        )


class Fleet:
    """A global scheduler over runtimes. Programs run against it: it is a `dsl.backend.Backend`."""

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        *,
        chat: ChatFormat,
        profile: CostProfile,
        policy: str = DEFAULT_POLICY,
        seed: int = 0,
        on_record: OnRecord | None = None,
    ) -> None:
        self._runtimes = {runtime.info.worker_id: runtime for runtime in runtimes}
        self._live = set(self._runtimes)
        self._chat = chat
        self._profile = profile
        self._policy = policy
        self._on_record = on_record
        self._portal: BlockingPortal | None = None
        self._calls: dict[RequestId, _Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._clock = time.monotonic
        self.scheduler = make_scheduler(policy, rng=random.Random(seed))
        for info in (runtime.info for runtime in runtimes):
            self.scheduler.on_worker_up(
                info.worker_id,
                kv_tokens=info.kv_tokens,
                page_size=info.page_size,
                profile=profile,
                now=self._clock(),
            )

    @classmethod
    def launch(
        cls,
        model_path: str | Path | None = None,
        *,
        runtimes: int | None = None,
        policy: str = DEFAULT_POLICY,
        kv_tokens: int | None = None,
        port: int | None = None,
        extra_args: Sequence[str] = (),
    ) -> "Opening[Fleet]":
        """Start SGLang runtimes on this machine for as long as the context lasts.

        One per GPU, or two on the CPU, unless `runtimes` says otherwise. Without `model_path` a small
        model with random weights is written and used. `kv_tokens` bounds each runtime's KV cache. The
        runtimes listen on `port` and the ports after it, or on free ones. `extra_args` go to SGLang as
        they are. Use it with `with` or, in async code, `async with`.

        Raises InputError (bad arguments) or LaunchError (with the end of the runtime's log).
        """
        check_name(policy)
        specs = launch_specs(model_path, runtimes, kv_tokens, port, tuple(extra_args))
        profile = profile_of(on_cpu=specs[0].gpu is None)

        @asynccontextmanager
        async def opened() -> AsyncIterator[Fleet]:
            async with launch_runtimes(specs) as started:
                chat = ChatFormat.load(specs[0].model_path)
                async with cls(started, chat=chat, profile=profile, policy=policy)._opened() as fleet:
                    yield fleet

        return Opening(opened)

    @classmethod
    def attach(
        cls, urls: Sequence[str], *, model_path: str | Path | None = None, policy: str = DEFAULT_POLICY
    ) -> "Opening[Fleet]":
        """Use SGLang servers that already run and serve the same model. They are never stopped.

        `model_path` is where the tokenizer is read from; by default the path the first server reports.
        Raises InputError (bad arguments, different models) or RuntimeLost (nobody answers).
        """
        check_name(policy)
        if not urls:
            raise InputError("no runtime to attach to: give at least one URL")

        @asynccontextmanager
        async def opened() -> AsyncIterator[Fleet]:
            async with AsyncExitStack() as stack:
                servers = [await stack.enter_async_context(SglangRuntime.attach(url)) for url in urls]
                models = {server.info.model_path for server in servers}
                if len(models) > 1:
                    raise InputError(f"the servers run different models: {', '.join(sorted(models))}")
                chat = ChatFormat.load(model_path or servers[0].info.model_path)
                profile = profile_of(on_cpu=servers[0].info.device == "cpu")
                fleet = cls(servers, chat=chat, profile=profile, policy=policy)
                yield await stack.enter_async_context(fleet._opened())

        return Opening(opened)

    def with_policy(self, policy: str, *, on_record: OnRecord | None = None) -> "Fleet":
        """Return a fleet over the same runtimes with a scheduler that knows nothing yet.

        Do not run calls through both at once: each believes that the runtimes are its own.
        """
        runtimes = tuple(self._runtimes.values())
        fleet = Fleet(runtimes, chat=self._chat, profile=self._profile, policy=policy, on_record=on_record)
        fleet._portal = self._portal
        return fleet

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template of the fleet's model."""
        return self._chat

    @property
    def worker_ids(self) -> tuple[WorkerId, ...]:
        """The fleet's workers, in order."""
        return tuple(self._runtimes)

    def bind(self, portal: BlockingPortal) -> None:
        """Tell the fleet which event loop it lives on, so that `call` can reach it from other threads."""
        self._portal = portal

    def call(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Run `fn` on the fleet's event loop and wait, from code that is not async.

        An interrupt cancels it. Raises InputError if the fleet was opened in async code.
        """
        if self._portal is None:
            raise InputError("this fleet was opened with `async with`: use arun, amap and aplan")
        future = self._portal.start_task_soon(fn)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Place and run one request; a lost runtime is survived by running it again on another.

        `on_chunk` is told of each piece of the answer and of the attempt, from 0, that it belongs to.
        Cancelling aborts it on its runtime. Raises RequestRejected, or NoWorkerError when no runtime
        is left.
        """
        call = _Call(request, asyncio.get_running_loop().create_future(), self._clock(), on_chunk)
        self.scheduler.submit(request, call.submitted_at)
        self._calls[request.request_id] = call
        try:
            self._dispatch()
            return await call.answer
        finally:
            self._forget(call)

    def begin_program(self, hint: PlanHint) -> None:
        """Tell the scheduler that a program run begins, and what is known of it."""
        self.scheduler.register_plan(hint, self._clock())

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Tell the scheduler that a program run makes no call for about so many seconds."""
        self.scheduler.on_pause(program_id, expected_s, self._clock())
        self._dispatch()

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Tell the scheduler that a program run will not use so many tokens of its KV again."""
        self.scheduler.on_branch_done(program_id, num_tokens, self._clock())
        self._dispatch()

    def end_program(self, program_id: ProgramId) -> None:
        """Tell the scheduler that a program run makes no more calls."""
        self.scheduler.release_program(program_id, self._clock())
        self._dispatch()

    async def flush_cache(self) -> None:
        """Make every runtime forget its cached prefixes; waits until they are idle."""
        for worker_id, runtime in self._runtimes.items():
            await runtime.flush_cache()
            self.scheduler.on_cache_cleared(worker_id, self._clock())

    def predict(self, plan: Plan) -> Prediction:
        """Return what this fleet's policy would reuse of `plan`'s prompts, starting from empty caches."""
        infos = [runtime.info for runtime in self._runtimes.values()]
        workers = [WorkerSpec(i.worker_id, i.kv_tokens, i.page_size, self._profile) for i in infos]
        return predict(plan, workers, self._policy)

    def _dispatch(self) -> None:
        """Start what the scheduler places now; fail what waits when no worker is left."""
        for placement in self.scheduler.dispatch(self._clock()):
            call = self._calls[placement.request_id]
            call.task = asyncio.create_task(self._attempt(call, placement))
            self._tasks.add(call.task)
            call.task.add_done_callback(self._tasks.discard)
        if not self._live:
            for call in self._calls.values():
                self._fail(call, NoWorkerError("every runtime of the fleet is lost"))

    async def _attempt(self, call: _Call, placement: Placement) -> None:
        attempt = _Attempt(placement, self._clock())
        try:
            await self._stream(call, attempt)
        except RuntimeLost:
            self._lose(placement.worker_id)
        except Exception as error:
            self._fail(call, error)
        else:
            self._finish(call, attempt)
        self._dispatch()

    async def _stream(self, call: _Call, attempt: _Attempt) -> None:
        request, number, call.num_attempts = call.request, call.num_attempts, call.num_attempts + 1
        async for chunk in self._runtimes[attempt.placement.worker_id].stream(request):
            attempt.chunks.append(chunk)
            if call.on_chunk:
                call.on_chunk(chunk, number)
            if attempt.first_token_at is None:
                attempt.first_token_at = self._clock()
                self.scheduler.on_first_token(request.request_id, attempt.first_token_at)
                self._dispatch()

    def _finish(self, call: _Call, attempt: _Attempt) -> None:
        if call.answer.done():  # given up while the last chunk was on its way
            return
        now, completion = self._clock(), attempt.completion()
        self.scheduler.on_finish(
            call.request.request_id,
            output=completion.output_ids,
            cached_tokens=completion.usage.cached_tokens,
            now=now,
        )
        if self._on_record:
            self._on_record(attempt.record(call, completion, now))
        call.answer.set_result(completion)

    def _fail(self, call: _Call, error: Exception) -> None:
        if not call.answer.done():
            self.scheduler.on_cancel(call.request.request_id, self._clock(), failed=True)
            call.answer.set_exception(error)

    def _lose(self, worker_id: WorkerId) -> None:
        """Take a worker out; the attempts that ran on it end, and their calls wait for placement again."""
        if worker_id not in self._live:
            return  # another attempt on it noticed first
        self._live.remove(worker_id)
        for request_id in self.scheduler.on_worker_down(worker_id, self._clock()):
            task = self._calls[request_id].task
            if task is not None and task is not asyncio.current_task():
                task.cancel()

    def _forget(self, call: _Call) -> None:
        """Drop a call that was answered or given up; one given up is taken back from its runtime."""
        del self._calls[call.request.request_id]
        if call.answer.cancelled():
            self.scheduler.on_cancel(call.request.request_id, self._clock())
            if call.task is not None:
                call.task.cancel()
            self._dispatch()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Self]:
        """Leave only when no attempt is under way any more."""
        try:
            yield self
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
