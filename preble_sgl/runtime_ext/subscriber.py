"""Follow what an SGLang runtime publishes over ZeroMQ: its cache events, complete and in order, and its load.

A subscriber misses what is published before it is connected, while its connection is lost, and what a full
queue drops. Batches are numbered, so that this shows, and a second socket replays the last ones. The rules:

- At first, and after each lost connection, replay from 0: another process may use the awaited numbers.
- A batch beyond the awaited one: replay from the awaited one.
- A live batch whose number was live before comes from a restarted runtime: replay from 0.
- A replay tells of what has long changed again: it is applied when all of it is there, with no placement
  in between.
- What a replay cannot bring any more is lost: the sink is told, and nothing is asked for again until a
  history starts by itself.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import anyio
import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from preble_sgl.core import CacheEvent, WorkerId
from preble_sgl.runtime_ext.cache_events import (
    BadEvents,
    EventReader,
    EventSource,
    events_of,
    sequence_number,
)
from preble_sgl.runtime_ext.protocol import RuntimeLoad
from preble_sgl.runtime_ext.tasks import cancel_all

log = logging.getLogger("preble_sgl")

CONNECT_S = 5.0
SETTLE_S = 0.05
"""Seconds from a connection to when the publisher knows, as a rule, what is subscribed to."""
REPLAY_S = 5.0
"""Seconds for the next message of a replay: a busy runtime looks for requests between its steps only."""
MAX_BACKLOG = 100_000


class Answer(Protocol):
    """What became of a batch: see `global_sched.cache_feed.FeedResult`."""

    @property
    def status(self) -> str: ...
    @property
    def next_seq(self) -> int: ...


class Sink(Protocol):
    """Where the events of one runtime go."""

    def receive(self, seq: int, events: Sequence[CacheEvent]) -> Answer:
        """Take a batch."""
        ...

    def lose(self) -> None:
        """Learn that batches are missing for good."""
        ...


class CacheSubscriber:
    """The events of one runtime, on their way to a sink. `follow` runs until it is cancelled.

    `caught_up` is set once what was published before has been told, or cannot be.
    """

    def __init__(self, source: EventSource, worker_id: WorkerId, sink: Sink) -> None:
        self._source = source
        self._worker_id = worker_id
        self._sink = sink
        self._reader = EventReader(worker_id)
        self._last_live = -1
        self._is_hopeless = False
        self._must_restart = False
        self._connected = asyncio.Event()
        self.caught_up = asyncio.Event()

    async def follow(self) -> None:
        """Bring every batch to the sink; ends by itself only if what is published cannot be used."""
        with (
            _context() as context,
            _subscription(context, self._source.endpoint, self._source.topic) as events,
        ):
            watching = asyncio.create_task(self._watch(events.get_monitor_socket()))
            try:
                with anyio.move_on_after(CONNECT_S):
                    await self._connected.wait()
                await asyncio.sleep(SETTLE_S)
                await self._replay(context, 0)
                self.caught_up.set()
                while True:
                    await self._take(context, await events.recv_multipart())
                    await asyncio.sleep(0)  # others have their turn, too, when much has come at once
            except BadEvents as error:
                log.error("%s; its cache is estimated from now on", error)
                self._sink.lose()
            finally:
                self.caught_up.set()
                await cancel_all([watching])

    async def _watch(self, monitor: Any) -> None:
        """Notice connections: each but the first may be to another process."""
        while True:
            message = await recv_monitor_message(monitor)
            if message["event"] == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._must_restart = self._connected.is_set()
                self._connected.set()

    async def _take(self, context: zmq.asyncio.Context, frames: Sequence[bytes]) -> None:
        seq, events = events_of(frames, self._reader)
        is_new_process = self._must_restart or seq <= self._last_live
        self._last_live, self._must_restart = seq, False
        if is_new_process:
            await self._replay(context, 0)
        answer = self._sink.receive(seq, events)
        if answer.status == "started":
            self._is_hopeless = False
        elif answer.status == "gap" and not self._is_hopeless:
            await self._replay(context, answer.next_seq)

    async def _replay(self, context: zmq.asyncio.Context, start: int) -> None:
        """Bring what was published from batch `start` on; tell the sink if that is not there any more."""
        self._is_hopeless = not await self._replays(context, start)
        if self._is_hopeless:
            self._sink.lose()

    async def _replays(self, context: zmq.asyncio.Context, start: int) -> bool:
        """Return whether a replay brings all that it should, having told it."""
        batches = await self._ask_for_replay(context, start)
        return batches is not None and all(self._sink.receive(*batch).status != "gap" for batch in batches)

    async def _ask_for_replay(
        self, context: zmq.asyncio.Context, start: int
    ) -> list[tuple[int, Sequence[CacheEvent]]] | None:
        """Return the batches from `start` on, or None if nobody has them."""
        if self._source.replay_endpoint is None:
            return None
        batches: list[tuple[int, Sequence[CacheEvent]]] = []
        with _socket(context, zmq.DEALER) as dealer:
            dealer.connect(self._source.replay_endpoint)
            await dealer.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                frames: Sequence[bytes] | None = None
                with anyio.move_on_after(REPLAY_S):
                    frames = await dealer.recv_multipart()
                if frames is None:
                    log.warning("runtime %s does not answer to a replay of its cache events", self._worker_id)
                    return None
                seq = sequence_number(frames[-2])
                if seq < 0:
                    return batches
                batches.append((seq, self._reader.read(frames[-1])))
                await asyncio.sleep(0)


async def follow_loads(endpoint: str, on_load: Callable[[RuntimeLoad], None]) -> None:
    """Tell each load that a runtime pushes, until cancelled. Its silence means nothing."""
    decode = msgspec.msgpack.Decoder(_LoadStat).decode
    with _context() as context, _subscription(context, endpoint, "load") as loads:
        while True:
            frames = await loads.recv_multipart()
            try:
                stat = decode(frames[2])
            except (msgspec.MsgspecError, IndexError) as error:
                log.error("%s publishes a load that is not understood: %s", endpoint, error)
                return
            on_load(stat.load())


class _LoadStat(msgspec.Struct, array_like=True, tag="LoadStat", gc=False):
    """SGLang's `LoadStat`, of which later releases have more at the end."""

    num_running: int
    num_waiting: int
    used_tokens: int
    kv_tokens: int
    rank: int | None = None
    waiting_tokens: int = 0
    total_tokens: int = 0
    max_running: int = 0
    prefilled_tokens: int = 0
    prefill_busy_us: int = 0

    def load(self) -> RuntimeLoad:
        return RuntimeLoad(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            waiting_tokens=self.waiting_tokens,
            used_tokens=self.used_tokens,
            kv_tokens=self.kv_tokens,
            prefilled_tokens=self.prefilled_tokens,
            prefill_busy_s=self.prefill_busy_us / 1e6,
        )


@contextmanager
def _context() -> Iterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


@contextmanager
def _socket(context: zmq.asyncio.Context, kind: int) -> Iterator[Any]:
    socket = context.socket(kind)
    try:
        yield socket
    finally:
        socket.close(linger=0)


@contextmanager
def _subscription(context: zmq.asyncio.Context, endpoint: str, topic: str) -> Iterator[Any]:
    with _socket(context, zmq.SUB) as socket:
        socket.set_hwm(MAX_BACKLOG)
        socket.subscribe(topic)
        socket.connect(endpoint)
        try:
            yield socket
        finally:
            socket.disable_monitor()
