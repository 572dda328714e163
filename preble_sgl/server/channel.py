"""What processes of one server say to each other about requests, over a Unix socket of their user.

    front                                   the process with the scheduler
    Asked    a request wants a turn   ──►
                                      ◄──   Placed   do it there
    Begun    its first token is there ──►
    Broke    that runtime failed      ──►            (then Placed again, or Over)
                                      ◄──   Stopped  do not go on with it there
    Done     it is answered           ──►
                                      ◄──   Over     it is refused
    Gone     its client left          ──►

Frames are a length in 4 bytes and a message in MessagePack.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec

from preble_sgl.core import FinishReason, PlacementReason, ProgramId, RequestId, WorkerId
from preble_sgl.server.wanted import Wanted

LENGTH = 4
_encode = msgspec.msgpack.Encoder().encode


class _Message(msgspec.Struct, tag=True, array_like=True):
    pass


class Ready(_Message):
    """A front listens on the port."""


class Asked(_Message):
    """A request wants a turn and a place."""

    wanted: Wanted


class Begun(_Message):
    """A request has its first token; `assumed`: as far as can be known."""

    request_id: RequestId
    assumed: bool


class Broke(_Message):
    """A runtime was lost, or (`faulty`) failed at a request. `num_tokens`: as of a `Work`."""

    request_id: RequestId
    faulty: bool
    why: str
    num_tokens: int


class Done(_Message):
    """A request is answered."""

    request_id: RequestId
    cached_tokens: int
    output_tokens: int
    finish_reason: FinishReason


class Gone(_Message):
    """A request ended otherwise. `failed`: its runtime refused it."""

    request_id: RequestId
    failed: bool


class Answered(_Message):
    """An HTTP answer, to be counted."""

    path: str
    status: int
    tenant: str


class Placed(_Message):
    """Where to do a request."""

    request_id: RequestId
    program_id: ProgramId
    worker_id: WorkerId
    url: str
    api_key: str | None
    matched_len: int
    reason: PlacementReason
    priority: int | None
    kv_hints: dict[str, Any] | None
    first_token_in_s: float
    tells_new_only: bool


class Stopped(_Message):
    """A request is not to go on where it is placed."""

    request_id: RequestId


class Over(_Message):
    """A request is refused: what to tell its client."""

    request_id: RequestId
    status: int
    message: str
    code: str | None
    retry_after_s: int | None


FromFront: TypeAlias = Ready | Asked | Begun | Broke | Done | Gone | Answered
ToFront: TypeAlias = Placed | Stopped | Over
M = TypeVar("M")


class Channel(asyncio.Protocol, Generic[M]):
    """One end of a connection. `on_message` is called for each message, `on_lost` at its end."""

    def __init__(
        self,
        kind: Any,
        on_message: Callable[["Channel[M]", M], None],
        on_lost: Callable[["Channel[M]"], None],
    ) -> None:
        self._decode: Callable[[bytes], M] = msgspec.msgpack.Decoder(kind).decode
        self._on_message = on_message
        self._on_lost = on_lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._transport = None
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        """Take what came, cut anywhere."""
        self._buffer += data
        begin, end = 0, len(self._buffer)
        while end - begin >= LENGTH:
            stop = begin + LENGTH + int.from_bytes(self._buffer[begin : begin + LENGTH])
            if stop > end:
                break
            self._on_message(self, self._decode(bytes(self._buffer[begin + LENGTH : stop])))
            begin = stop
        del self._buffer[:begin]

    def send(self, message: FromFront | ToFront) -> None:
        """Send a message; nothing if the other end is gone, which `on_lost` tells."""
        if self._transport is not None:
            data = _encode(message)
            self._transport.write(len(data).to_bytes(LENGTH) + data)
