"""A server over a fleet, for tests, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import orjson

from preble_sgl.fleet import Fleet
from preble_sgl.runtime_ext.emulated.server import emulated_runtime
from preble_sgl.runtime_ext.supervisor import Watching
from preble_sgl.server.app import FrontDoor, documented_app, one_process_app
from preble_sgl.server.front import Front, ServerOptions
from preble_sgl.server.front_calls import FrontCalls
from preble_sgl.server.front_processes import CALLS, REST
from preble_sgl.server.gateway import Gateway
from preble_sgl.server.http import ASGIApp
from preble_sgl.server.passed_on import PassedOn
from preble_sgl.server.prompts import Prompts
from preble_sgl.server.remote_carrier import RemoteCarrier
from preble_sgl.server.serve import Listening, Server, make_server
from preble_sgl.server.tenants import Tenants
from preble_sgl.server.traces import Traces
from tests.runtime_ext.emulated.runtimes import config

WITH_FRONT = False
"""Whether servers take connections as a process without a scheduler does, see `with_and_without_front`."""

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
    fleet: Fleet,
    tenants: Tenants | None = None,
    options: ServerOptions | None = None,
    traces: Traces | None = None,
) -> AsyncIterator[Served]:
    """Serve over a fleet."""
    gateway = Gateway(fleet, tenants or Tenants({}, open_admin=True), options)
    async with AsyncExitStack() as stack:
        if WITH_FRONT:
            app: ASGIApp = await stack.enter_async_context(front_of(gateway))
        else:
            app = one_process_app(gateway, traces or Traces())
        server = make_server(app, Listening(port=0), gateway.close)
        port = await stack.enter_async_context(listening(server))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Served(f"http://127.0.0.1:{port}", gateway, session)


@asynccontextmanager
async def listening(server: Server) -> AsyncIterator[int]:
    """Run a server; yield its port."""
    task = asyncio.create_task(server.serve())
    try:
        yield await server.wait_started()
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def front_of(gateway: Gateway) -> AsyncIterator[FrontDoor]:
    """Yield a front as another process would have it, connected over real sockets."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        calls, rest = FrontCalls(gateway), str(directory / REST)
        loop = asyncio.get_running_loop()
        await stack.enter_async_context(await loop.create_unix_server(calls.accept, str(directory / CALLS)))
        server = make_server(documented_app(gateway), Listening(), gateway.close, uds=rest)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        connections = await stack.enter_async_context(AsyncExitStack())
        carrier = RemoteCarrier(connections, lambda: None)
        passed_on = await stack.enter_async_context(PassedOn.to(directory / REST, gateway.options.limits))
        transport, _ = await loop.create_unix_connection(lambda: carrier.channel, str(directory / CALLS))
        front = Front(carrier, Prompts(gateway.fleet.chat), gateway.tenants, gateway.options)
        yield FrontDoor(front, passed_on)
        transport.close()
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
