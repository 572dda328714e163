"""Raw ASGI for the hot path: read one body, write one answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias
from urllib.parse import quote

from preble_sgl.errors import PrebleError
from preble_sgl.server.errors import ApiError

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]

JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"
PRINTABLE = "!#$&'*+,/:;=?@[]^|"
"""What stays as it is in a header beside letters and digits."""


def header_value(text: str) -> bytes:
    """Return a text as it may stand in a header."""
    return quote(text, PRINTABLE).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one connection may cost. Bytes, and seconds: to send a body, and for which it reads nothing."""

    body_bytes: int = 32 * 2**20
    body_s: float = 30.0
    stalled_s: float = 60.0


class ClientGone(PrebleError):
    """Nobody reads the answer any more."""


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """Return a whole body. Raises ApiError (408, 413) or ClientGone."""
    try:
        async with asyncio.timeout(limits.body_s):
            return await _read(receive, limits.body_bytes)
    except TimeoutError:
        raise ApiError(
            HTTPStatus.REQUEST_TIMEOUT, f"the body took longer than {limits.body_s:g} s", code="slow_body"
        ) from None


async def _read(receive: Receive, most: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left before its body was complete")
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {most} bytes", code="too_large"
            )
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


async def wait_gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Reply:
    """The answer to one request. `headers` go with it whatever it is."""

    def __init__(self, send: Send, stalled_s: float, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._send = send
        self._stalled_s = stalled_s
        self.headers: Headers = list(headers)
        self.status: int | None = None
        self.is_complete = False

    @property
    def has_begun(self) -> bool:
        """Whether the client got something already."""
        return self.status is not None

    async def begin(self, status: int, kind: bytes, headers: Headers) -> None:
        """Send the status and headers."""
        self.status = status
        self.headers += headers
        sent = [(b"content-type", kind), *self.headers]
        await self._send({"type": "http.response.start", "status": status, "headers": sent})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send bytes, as fast as they are read. Raises ClientGone if nothing is read for too long."""
        self.is_complete = not more
        try:
            async with asyncio.timeout(self._stalled_s):
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientGone(f"the client has read nothing for {self._stalled_s:g} s") from None

    async def whole(self, status: int, body: bytes, headers: Headers, kind: bytes = JSON) -> None:
        """Send a whole answer."""
        await self.begin(status, kind, [*headers, (b"content-length", str(len(body)).encode())])
        await self.write(body, more=False)

    async def refuse(self, error: ApiError) -> None:
        """Send an error: as the answer or, where that has begun, as the stream's last event."""
        if self.has_begun:
            await self.write(b"data: " + error.body() + b"\n\n", more=False)
        else:
            await self.whole(error.status, error.body(), error.headers)
