"""A server over a fleet, for tests, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson

from preble_sgl.fleet import Fleet
from preble_sgl.runtime_ext.emulated.server import emulated_runtime
from preble_sgl.runtime_ext.supervisor import Watching
from preble_sgl.server.gateway import Gateway, ServerOptions
from preble_sgl.server.serve import Listening, make_server
from preble_sgl.server.tenants import Tenants
from tests.runtime_ext.emulated.runtimes import config

QUICK = Watching(poll_s=0.1, backoff_s=0.1)


@dataclass(frozen=True)
class Served:
    """A server that listens."""

    url: str
    gateway: Gateway
    session: aiohttp.ClientSession

    @property
    def fleet(self) -> Fleet:
        return self.gateway.fleet

    async def post(self, path: str, body: object, **headers: str) -> "Reply":
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(self.url + path, data=raw, headers=named) as response:
            return Reply(response.status, dict(response.headers), await response.read())

    async def get(self, path: str, **headers: str) -> "Reply":
        async with self.session.get(self.url + path, headers=headers) as response:
            return Reply(response.status, dict(response.headers), await response.read())

    async def wait_idle(self) -> None:
        async with asyncio.timeout(10):
            while self.gateway.admission.num_running or self.fleet.scheduler.num_running:
                await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        content: dict[str, object] = orjson.loads(self.body)
        return content

    @property
    def error(self) -> str:
        content = self.json["error"]
        assert isinstance(content, dict)
        return str(content["message"])


@asynccontextmanager
async def served(
    urls: Sequence[str],
    model_path: Path,
    tenants: Tenants | None = None,
    options: ServerOptions | None = None,
    policy: str = "preble_e2",
) -> AsyncIterator[Served]:
    """Serve over runtimes that run."""
    opening = Fleet.attach(urls, model_path=model_path, watching=QUICK, policy=policy)
    async with opening as fleet, serving(fleet, tenants, options) as server:
        yield server


@asynccontextmanager
async def serving(
    fleet: Fleet, tenants: Tenants | None = None, options: ServerOptions | None = None
) -> AsyncIterator[Served]:
    """Serve over a fleet."""
    gateway = Gateway(fleet, tenants or Tenants({}, open_admin=True), options)
    server = make_server(gateway, Listening(port=0))
    task = asyncio.create_task(server.serve())
    port = await server.wait_started()
    try:
        async with aiohttp.ClientSession() as session:
            yield Served(f"http://127.0.0.1:{port}", gateway, session)
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def served_emulated(
    model_path: Path,
    tenants: Tenants | None = None,
    options: ServerOptions | None = None,
    *,
    num: int = 2,
    step_s: float = 1e-4,
    kv_tokens: int = 20_000,
) -> AsyncIterator[Served]:
    """Serve over emulated runtimes with the tiny model's tokenizer."""
    async with AsyncExitStack() as stack:
        one = config(step_s, engine={"kv_tokens": kv_tokens}, model_path=str(model_path))
        urls = [await stack.enter_async_context(emulated_runtime(one)) for _ in range(num)]
        yield await stack.enter_async_context(served(urls, model_path, tenants, options))
