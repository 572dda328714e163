"""What a front process does not answer itself goes to the process with the scheduler, over a Unix socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import aiohttp
from yarl import URL

from preble_sgl.server.errors import ApiError
from preble_sgl.server.http import ClientGone, Limits, Receive, Reply, Scope, Send, read_body, wait_gone

HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host"}


@dataclass(frozen=True, slots=True)
class PassedOn:
    """An ASGI application that is in another process."""

    session: aiohttp.ClientSession
    limits: Limits

    @classmethod
    @asynccontextmanager
    async def to(cls, socket: Path, limits: Limits) -> AsyncIterator["PassedOn"]:
        """Connect for as long as the context lasts."""
        async with aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(socket), limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        ) as session:
            yield cls(session, limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, and its answer back as it comes."""
        try:
            body = await read_body(receive, self.limits)
        except ClientGone:
            return
        except ApiError as error:
            await self._reply(send).refuse(error)
            return
        passing = asyncio.create_task(self._pass(scope, body, send))
        leaving = asyncio.create_task(wait_gone(receive))
        await asyncio.wait([passing, leaving], return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        passing.cancel()
        await asyncio.wait([passing])
        if not passing.cancelled():
            passing.result()

    async def _pass(self, scope: Scope, body: bytes, send: Send) -> None:
        query = scope["query_string"].decode("latin-1")
        path = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        headers = [
            (k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"] if k not in HOP_BY_HOP
        ]
        url = URL(f"http://scheduler{path}", encoded=True)
        try:
            async with self.session.request(
                scope["method"], url, data=body or None, headers=headers, allow_redirects=False
            ) as answer:
                await _answer(answer, send)
        except aiohttp.ClientConnectorError:
            ending = ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server ends", code="ending")
            await self._reply(send).refuse(ending)

    def _reply(self, send: Send) -> Reply:
        return Reply(send, self.limits.stalled_s)


async def _answer(answer: aiohttp.ClientResponse, send: Send) -> None:
    headers = [(name.lower(), value) for name, value in answer.raw_headers if name.lower() not in HOP_BY_HOP]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    async for data in answer.content.iter_any():
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
