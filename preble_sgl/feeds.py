"""What runtimes tell of their caches, on its way to the global scheduler."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preble_sgl.core import CacheEvent, WorkerId
from preble_sgl.global_sched.cache_feed import FeedResult
from preble_sgl.global_sched.scheduler import GlobalScheduler
from preble_sgl.runtime_ext.protocol import Runtime
from preble_sgl.runtime_ext.subscriber import CacheSubscriber


class Feeds:
    """One task per runtime that publishes its cache events."""

    def __init__(self, scheduler: GlobalScheduler, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._tasks: dict[WorkerId, asyncio.Task[None]] = {}

    def follow(self, runtime: Runtime) -> None:
        """Listen to a runtime that the scheduler has as a worker."""
        info = runtime.info
        if info.events is not None:
            sink = _Sink(self._scheduler, self._clock, info.worker_id)
            subscriber = CacheSubscriber(info.events, info.worker_id, sink)
            self._tasks[info.worker_id] = asyncio.create_task(subscriber.follow())

    def leave(self, worker_id: WorkerId) -> None:
        """Stop listening, before the scheduler forgets the worker."""
        if task := self._tasks.pop(worker_id, None):
            task.cancel()

    async def close(self) -> None:
        """Stop listening to all."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Sink:
    """The scheduler as one runtime's events see it."""

    scheduler: GlobalScheduler
    clock: Callable[[], float]
    worker_id: WorkerId

    def receive(self, seq: int, events: Sequence[CacheEvent]) -> FeedResult:
        return self.scheduler.on_cache_events(self.worker_id, seq, events, self.clock())

    def lose(self) -> None:
        self.scheduler.on_cache_feed_lost(self.worker_id, self.clock())
