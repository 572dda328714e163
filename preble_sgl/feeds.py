"""What runtimes tell of their caches and loads, on its way to the global scheduler."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio

from preble_sgl.core import CacheEvent, WorkerId, WorkerLoad
from preble_sgl.errors import PrebleError
from preble_sgl.global_sched.cache_feed import FeedResult
from preble_sgl.global_sched.scheduler import GlobalScheduler
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.protocol import RuntimeLoad
from preble_sgl.runtime_ext.subscriber import CacheSubscriber, follow_loads
from preble_sgl.runtime_ext.tasks import cancel_all

CATCH_UP_S = 3.0
POLL_S = 1.0
"""Seconds between questions to a runtime that does not push its load."""


class Feeds:
    """The tasks that listen to runtimes."""

    def __init__(self, scheduler: GlobalScheduler, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._tasks: dict[WorkerId, list[asyncio.Task[None]]] = {}
        self._catching_up: dict[WorkerId, asyncio.Event] = {}

    def follow(self, runtime: SglangRuntime) -> None:
        """Listen to a runtime that the scheduler has as a worker: to what it pushes, else ask it."""
        info = runtime.info
        sink = _Sink(self._scheduler, self._clock, info.worker_id)
        listeners = []
        if info.events is not None:
            subscriber = CacheSubscriber(info.events, info.worker_id, sink)
            self._catching_up[info.worker_id] = subscriber.caught_up
            listeners.append(subscriber.follow())
        if info.events is not None and info.events.load_endpoint is not None:
            listeners.append(follow_loads(info.events.load_endpoint, sink.on_load))
        else:
            listeners.append(_poll_loads(runtime, sink))
        self._tasks[info.worker_id] = [asyncio.create_task(listener) for listener in listeners]

    async def catch_up(self) -> None:
        """Wait until it is known what the runtimes have cached by now; for `CATCH_UP_S` seconds at most."""
        with anyio.move_on_after(CATCH_UP_S):
            for caught_up in list(self._catching_up.values()):
                await caught_up.wait()

    def leave(self, worker_id: WorkerId) -> None:
        """Stop listening, before the scheduler forgets the worker."""
        self._catching_up.pop(worker_id, None)
        for task in self._tasks.pop(worker_id, ()):
            task.cancel()

    async def close(self) -> None:
        """Stop listening to all."""
        await cancel_all(task for listeners in self._tasks.values() for task in listeners)


async def _poll_loads(runtime: SglangRuntime, sink: "_Sink") -> None:
    """Ask a runtime for its load again and again; whether it lives is for others to find out."""
    while True:
        with contextlib.suppress(PrebleError):
            sink.on_load(await runtime.loads())
        await asyncio.sleep(POLL_S)


@dataclass(frozen=True, slots=True)
class _Sink:
    """The scheduler as one runtime's events see it."""

    scheduler: GlobalScheduler
    clock: Callable[[], float]
    worker_id: WorkerId

    def receive(self, seq: int, events: Sequence[CacheEvent]) -> FeedResult:
        return self.scheduler.on_cache_events(self.worker_id, seq, events, self.clock())

    def on_load(self, load: RuntimeLoad) -> None:
        reported = WorkerLoad(num_requests=load.num_running + load.num_waiting)
        self.scheduler.on_load(self.worker_id, reported, self.clock())

    def lose(self) -> None:
        self.scheduler.on_cache_feed_lost(self.worker_id, self.clock())
