"""Run one engine model on the event loop's clock.

    arrival ─► its overhead ─► the engine's wait queue ─► start ─► sleep until it ends ─► finish ─► news

The engine lives in the time that it computes itself: an iteration starts when the one before ended, or when
the first request reaches an idle engine, never when this process happened to wake up. What arrives is handed
to it at its own instant. So being late delays what is told, by the `Lateness` that is counted here, but does
not add up and does not change what is computed.
"""

import asyncio
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from preble_sgl.core import CacheEvent, Request, RequestId, Usage
from preble_sgl.errors import InputError, RequestRejected
from preble_sgl.runtime_ext.emulated.text import Script
from preble_sgl.sim.engine import Engine
from preble_sgl.sim.jobs import EngineLoad, Finished, StepResult

OnEvents = Callable[[Sequence[CacheEvent]], None]


@dataclass(slots=True, eq=False)
class Answer:
    """What a request has been answered so far: the first `num_ready` tokens of its script.

    Its owner waits for `news`, which several answers may share; it comes with the end, and with every token
    if the answer `streams`. At the end one of `finished`, `refusal` and `is_aborted` is set.
    """

    request: Request
    script: Script
    news: asyncio.Event
    streams: bool
    arrived_at: float
    num_ready: int = 0
    cached_tokens: int = 0
    finished: Finished | None = None
    refusal: str | None = None
    is_aborted: bool = False
    ended_at: float | None = None

    def end(self, at: float) -> None:
        """Say that nothing more will come."""
        self.ended_at = at
        self.news.set()


@dataclass(slots=True)
class Lateness:
    """By how much this process woke up after the instants that the engine model gave, in seconds."""

    num: int = 0
    total_s: float = 0.0
    max_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """Mean over all iterations."""
        return self.total_s / max(1, self.num)

    def add(self, late_s: float) -> None:
        """Count one iteration."""
        self.num += 1
        self.total_s += late_s
        self.max_s = max(self.max_s, late_s)


class Driver:
    """Owns an engine and everything that it is computing. Use from one event loop."""

    def __init__(self, engine: Engine, on_events: OnEvents, *, overhead_s: float = 0.0) -> None:
        self.lateness = Lateness()
        self.served = Usage()
        self._engine = engine
        self._on_events = on_events
        self._overhead_s = overhead_s
        self._answers: dict[RequestId, Answer] = {}
        self._decoding: dict[RequestId, Answer] = {}
        self._inbox: list[tuple[float, int, Answer]] = []
        self._numbers = count()
        self._arrived = asyncio.Event()
        self._ended_at = 0.0

    def submit(self, answer: Answer) -> None:
        """Let a request enter the engine after its overhead. Raises InputError if its id is in use."""
        request_id = answer.request.request_id
        if request_id in self._answers:
            raise InputError(f"Duplicate request ID detected: {request_id}")
        self._answers[request_id] = answer
        entry = (answer.arrived_at + self._overhead_s, next(self._numbers), answer)
        heapq.heappush(self._inbox, entry)
        self._arrived.set()

    def abort(self, request_id: RequestId) -> None:
        """End a request where it is. No-op for one that is not there (any more), as in SGLang."""
        answer = self._answers.pop(request_id, None)
        if answer is None:
            return
        self._decoding.pop(request_id, None)
        self._engine.abort(request_id)
        answer.is_aborted = True
        answer.end(_now())

    def abort_beginning_with(self, prefix: str) -> None:
        """End every request whose id begins with `prefix`."""
        for request_id in [request_id for request_id in self._answers if request_id.startswith(prefix)]:
            self.abort(request_id)

    def knows(self, request_id: str) -> bool:
        """Say whether a request of this id is unfinished."""
        return request_id in self._answers

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run, those in their overhead included."""
        return len(self._answers)

    def flush_cache(self) -> bool:
        """Forget what is cached; refuse while there are requests."""
        if self._answers or not self._engine.flush_cache():
            return False
        self._tell_events(self._engine.cache.take_events())
        return True

    def load(self) -> EngineLoad:
        """Return what the engine is doing. Who is not handed over yet waits; who does not wait runs."""
        load = self._engine.load()
        arriving = [answer for _, _, answer in self._inbox if answer.ended_at is None]
        num_waiting = load.num_waiting + len(arriving)
        return replace(
            load,
            num_waiting=num_waiting,
            num_running=len(self._answers) - num_waiting,
            waiting_tokens=load.waiting_tokens + sum(len(answer.request.prompt) for answer in arriving),
        )

    @property
    def max_input_len(self) -> int:
        """The longest prompt that is accepted, in tokens."""
        return self._engine.max_input_len

    async def run(self) -> None:
        """Drive the engine until cancelled."""
        while True:
            started_at = await self._next_start()
            ends_at = self._engine.start(started_at, max_decode_steps=1)
            if ends_at is None:
                await self._wait_arrival()
                continue
            await self._sleep_until(ends_at)
            self._ended_at = ends_at
            self._tell(self._engine.finish())

    async def _next_start(self) -> float:
        """Wait until there is something to compute, hand over what is there by then; return the instant."""
        at = self._ended_at
        while not self._engine.has_work:
            self._tell_events(self._engine.cache.take_events())
            while not self._inbox:
                await self._wait_arrival()
            at = max(self._ended_at, self._inbox[0][0])
            await asyncio.sleep(at - _now())
            self._hand_over(at)
        self._hand_over(at)
        return at

    async def _wait_arrival(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    async def _sleep_until(self, at: float) -> None:
        await asyncio.sleep(at - _now())
        self.lateness.add(max(0.0, _now() - at))

    def _hand_over(self, at: float) -> None:
        """Give the engine every request that has reached it by `at`."""
        while self._inbox and self._inbox[0][0] <= at:
            entered_at, _, answer = heapq.heappop(self._inbox)
            if answer.ended_at is not None:
                continue
            try:
                self._engine.submit(answer.request, answer.script.ids, entered_at)
            except RequestRejected as error:
                del self._answers[answer.request.request_id]
                answer.refusal = str(error)
                answer.end(_now())

    def _tell(self, result: StepResult) -> None:
        """Pass on what an iteration has brought."""
        for request_id in result.first_tokens:
            if (answer := self._answers.get(request_id)) is not None:
                self._decoding[request_id] = answer
        for finished in result.finished:
            self._finish(finished)
        for request_id, answer in self._decoding.items():
            self._grow(answer, self._engine.output_len(request_id))
        self._tell_events(result.events)

    def _grow(self, answer: Answer, num_ready: int) -> None:
        if not answer.num_ready:
            answer.cached_tokens = self._engine.cached_tokens(answer.request.request_id)
        if num_ready > answer.num_ready:
            answer.num_ready = num_ready
            if answer.streams:
                answer.news.set()

    def _finish(self, finished: Finished) -> None:
        self._decoding.pop(finished.request_id, None)
        answer = self._answers.pop(finished.request_id, None)
        if answer is None:
            return  # aborted in the same iteration
        self.served += finished.usage
        answer.finished = finished
        answer.num_ready = finished.usage.output_tokens
        answer.cached_tokens = finished.usage.cached_tokens
        answer.end(_now())

    def _tell_events(self, events: Sequence[CacheEvent]) -> None:
        if events:
            self._on_events(events)


def _now() -> float:
    return asyncio.get_running_loop().time()
