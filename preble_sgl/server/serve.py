"""Listen: uvicorn around the application, with what it lacks against clients that dawdle or flood."""

import asyncio
import os
import socket
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from preble_sgl.errors import InputError
from preble_sgl.server.http import ASGIApp

HOST = "127.0.0.1"
HEADERS_S = 10.0
HEADER_BYTES = 64 * 2**10
BACKLOG = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where to listen. `drain_s`: how long requests may go on once the server is told to end."""

    host: str = HOST
    port: int = 30000
    certificate: Path | None = None
    private_key: Path | None = None
    drain_s: int = 120

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("TLS needs both: a certificate and its private key")
        for file in (self.certificate, self.private_key):
            if file is not None and not os.access(file, os.R_OK):
                raise InputError(f"{file} cannot be read")


class GuardedProtocol(HttpToolsProtocol):
    """Ends a connection whose headers take too long to come, or are too large."""

    _headers_timer: TimerHandle | None = None
    _headers_size = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Expect headers."""
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._headers_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Expect the rest of the headers once their first byte is there."""
        if self._headers_timer is None and self.cycle is not None and self.cycle.response_complete:
            self._expect_headers()
        super().data_received(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, unless there were too many."""
        self._headers_size += len(name) + len(value)
        if self._headers_size > HEADER_BYTES:
            self.transport.abort()
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin with the request."""
        self._headers_came()
        super().on_headers_complete()

    def _expect_headers(self) -> None:
        self._headers_timer = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _headers_came(self) -> None:
        self._headers_size = 0
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None


class Server(uvicorn.Server):
    """Tells of the signal to end, and ends unless somebody says (`False`) that he will see to it."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], bool]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take note of a signal."""
        if self._on_signal():
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: "list[socket.socket] | None" = None) -> None:
        """Let requests finish. The signal is not raised again: the fleet has to end, too."""
        await super().shutdown(sockets)
        self._captured_signals.clear()

    async def wait_started(self) -> int:
        """Wait until it listens; return the port."""
        while not self.started:
            await asyncio.sleep(0.01)
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port


def make_server(app: ASGIApp, listening: Listening, on_signal: Callable[[], bool], **how: Any) -> Server:
    """Return a server that is ready to `serve()`. `how`: more of uvicorn's settings."""
    tls: dict[str, Any] = {}
    if listening.certificate is not None:
        tls = {"ssl_certfile": listening.certificate, "ssl_keyfile": listening.private_key}
    config = uvicorn.Config(
        app,
        host=listening.host,
        port=listening.port,
        http=GuardedProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=listening.drain_s,
        **tls,
        **how,
    )
    return Server(config, on_signal)
