"""Publish cache events over ZeroMQ as SGLang does.

PUB sends `[topic, sequence as 8 bytes, msgpack [time, [event, ...], rank]]`, numbered from 0. A DEALER that
sends `[b"", first sequence]` to the replay socket gets one message `[b"", topic, sequence, payload]` per
batch from there on, then one of sequence -1.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from preble_sgl.core import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.emulated.config import KvEventsConfig
from preble_sgl.runtime_ext.ports import to_loopback

END = (-1).to_bytes(8, "big", signed=True)
RANK = 0
MEDIUM = "GPU"


class Publisher(Protocol):
    """Where cache events go."""

    def publish(self, events: Sequence[CacheEvent]) -> None:
        """Send one batch."""
        ...

    def describe(self, block_size: int) -> dict[str, Any] | None:
        """Return what `/server_info` says under `kv_events`."""
        ...


class NoPublisher:
    """Drops everything, as SGLang does by default."""

    def publish(self, events: Sequence[CacheEvent]) -> None:
        """Drop a batch."""

    def describe(self, block_size: int) -> None:
        """Return None: there is nothing to subscribe to."""


class ZmqPublisher:
    """Sends batches to whoever has subscribed, and keeps the last ones for who asks later."""

    def __init__(self, config: KvEventsConfig) -> None:
        self._config = config
        self._topic = config.topic.encode()
        self._encode = msgspec.msgpack.Encoder().encode
        self._next = 0
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._context = zmq.asyncio.Context()
        self._events: Any = self._context.socket(zmq.PUB, socket_class=zmq.Socket)  # type: ignore[arg-type]
        self._events.set_hwm(config.hwm)
        self._replay: zmq.asyncio.Socket | None = None
        self._endpoint = self._open(self._events, config.endpoint, binds=config.binds)
        self._replay_endpoint: str | None = None
        if config.replay_endpoint:
            self._replay = self._context.socket(zmq.ROUTER)
            self._replay.set_hwm(0)
            self._replay_endpoint = self._open(self._replay, config.replay_endpoint, binds=True)

    def publish(self, events: Sequence[CacheEvent]) -> None:
        """Send one batch; never waits."""
        payload = self._encode([time.time(), [as_map(event) for event in events], RANK])
        number = self._next.to_bytes(8, "big")
        self._next += 1
        self._sent.append((number, payload))
        self._events.send_multipart([self._topic, number, payload])

    def describe(self, block_size: int) -> dict[str, Any] | None:
        """Return what `/server_info` says under `kv_events`; None for an endpoint that is not TCP."""
        address = _address(self._endpoint)
        if address is None:
            return None
        described: dict[str, Any] = {
            "publisher": "zmq",
            "endpoint_host": address[0],
            "endpoint_port_base": address[1],
            "topic": self._config.topic,
            "block_size": block_size,
            "dp_size": 1,
        }
        if self._replay_endpoint and (replay := _address(self._replay_endpoint)):
            described["replay_endpoint_port_base"] = replay[1]
        return described

    async def serve_replay(self) -> None:
        """Answer who asks for batches that it has missed, until cancelled."""
        while self._replay is not None:
            caller, *rest = await self._replay.recv_multipart()
            if len(rest) != 2:
                continue
            for number, payload in [batch for batch in self._sent if batch[0] >= rest[1]]:
                await self._replay.send_multipart([caller, b"", self._topic, number, payload])
            await self._replay.send_multipart([caller, b"", b"", END, b""])

    def close(self) -> None:
        """Give the ports back."""
        self._context.destroy(linger=0)

    def _open(self, socket: Any, endpoint: str, *, binds: bool) -> str:
        """Bind or connect, a wildcard host on loopback only, and return the endpoint as it became."""
        endpoint = to_loopback(endpoint)
        try:
            (socket.bind if binds else socket.connect)(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise InputError(
                f"kv-events-config: {endpoint} cannot be used ({error}): choose another"
            ) from None
        return str(socket.getsockopt_string(zmq.LAST_ENDPOINT)) if binds else endpoint


@asynccontextmanager
async def publishing(config: KvEventsConfig | None) -> AsyncIterator[Publisher]:
    """Open a publisher that begins, as SGLang's, by telling that the cache is empty.

    Raises InputError for an endpoint that cannot be used.
    """
    if config is None or config.publisher == "null":
        yield NoPublisher()
        return
    publisher = ZmqPublisher(config)
    replay = asyncio.create_task(publisher.serve_replay())
    try:
        publisher.publish([CacheCleared()])
        yield publisher
    finally:
        replay.cancel()
        await asyncio.gather(replay, return_exceptions=True)
        publisher.close()


def as_map(event: CacheEvent) -> dict[str, Any]:
    """Return an event as SGLang writes it; fields without a value are left out, except the first two."""
    if isinstance(event, CacheCleared):
        return {"type": "AllBlocksCleared"}
    hashes = event.block_hashes.tolist()
    if isinstance(event, BlocksRemoved):
        return {"type": "BlockRemoved", "block_hashes": hashes, "medium": MEDIUM}
    return {"type": "BlockStored", "block_hashes": hashes, **_stored(event)}


def _stored(event: BlocksStored) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "parent_block_hash": event.parent_hash,
        "token_ids": event.token_ids.tolist(),
        "block_size": event.block_size,
        "lora_id": None,
        "medium": MEDIUM,
    }
    return fields | ({"cache_salt": event.namespace} if event.namespace else {})


def _address(endpoint: str) -> tuple[str, int] | None:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return (host, int(port)) if endpoint.startswith("tcp://") else None
