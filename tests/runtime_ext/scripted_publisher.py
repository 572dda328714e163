"""A publisher of cache events that loses what a test wants it to lose."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import zmq
import zmq.asyncio

from preble_sgl.core import CacheEvent
from preble_sgl.runtime_ext.cache_events import EventSource
from preble_sgl.runtime_ext.emulated.kv_publisher import as_map

END = (-1).to_bytes(8, "big", signed=True)


class ScriptedPublisher:
    """Numbers batches from 0, as one process does. `asked`: where each replay began."""

    def __init__(self, context: zmq.asyncio.Context, source: EventSource | None = None) -> None:
        self._events = context.socket(zmq.XPUB)
        self._replay = context.socket(zmq.ROUTER)
        self.source = EventSource(
            endpoint=_bind(self._events, source.endpoint if source else None),
            replay_endpoint=_bind(self._replay, source.replay_endpoint if source else None),
            topic="kv",
        )
        self.kept: list[tuple[bytes, bytes]] = []
        self.asked: list[int] = []
        self.is_deaf = False
        self._next = 0

    async def publish(self, *events: CacheEvent, lost: bool = False) -> None:
        """Send a batch, or only keep it for replays."""
        number, self._next = self._next.to_bytes(8, "big"), self._next + 1
        payload = msgspec.msgpack.encode([0.0, [as_map(event) for event in events], 0])
        self.kept.append((number, payload))
        if not lost:
            await self._events.send_multipart([b"kv", number, payload])

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send anything."""
        await self._events.send_multipart(list(frames))

    async def wait_subscribed(self) -> None:
        """Wait until somebody has subscribed."""
        await self._events.recv()

    async def serve_replay(self) -> None:
        """Answer replays until cancelled, unless told to be deaf."""
        while True:
            caller, _, start = await self._replay.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            if self.is_deaf:
                continue
            for number, payload in [batch for batch in self.kept if batch[0] >= start]:
                await self._replay.send_multipart([caller, b"", b"kv", number, payload])
            await self._replay.send_multipart([caller, b"", b"", END, b""])

    def close(self) -> None:
        """Give the ports back."""
        self._events.close(linger=0)
        self._replay.close(linger=0)


@asynccontextmanager
async def scripted_publisher(source: EventSource | None = None) -> AsyncIterator[ScriptedPublisher]:
    """Open a publisher, on the ports of an earlier one if given."""
    context = zmq.asyncio.Context()
    publisher = ScriptedPublisher(context, source)
    replay = asyncio.create_task(publisher.serve_replay())
    try:
        yield publisher
    finally:
        replay.cancel()
        await asyncio.gather(replay, return_exceptions=True)
        publisher.close()
        context.destroy(linger=0)


def _bind(socket: zmq.asyncio.Socket, endpoint: str | None) -> str:
    while True:
        try:
            socket.bind(endpoint or "tcp://127.0.0.1:*")
            break
        except zmq.ZMQError:  # ZeroMQ gives the port of a closed socket back a little later
            time.sleep(0.01)
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
