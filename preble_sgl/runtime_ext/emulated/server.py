"""Serve one emulated runtime on a loopback port, in the event loop that is running."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.emulated import native_api, openai_api, reports
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig
from preble_sgl.runtime_ext.emulated.driver import Driver
from preble_sgl.runtime_ext.emulated.emulation import EMULATION, Emulation
from preble_sgl.runtime_ext.emulated.http_answers import refuse_clearly
from preble_sgl.runtime_ext.emulated.kv_publisher import publishing
from preble_sgl.runtime_ext.emulated.text import load_codec
from preble_sgl.sim.engine import Engine

HOST = "127.0.0.1"
LARGEST_BODY = 2**28
ENDPOINTS = (
    ("POST", "/generate", native_api.generate),
    ("PUT", "/generate", native_api.generate),
    ("POST", "/abort_request", native_api.abort_request),
    ("GET", "/flush_cache", native_api.flush_cache),
    ("POST", "/flush_cache", native_api.flush_cache),
    ("POST", "/v1/completions", openai_api.completions),
    ("POST", "/v1/chat/completions", openai_api.chat_completions),
    ("GET", "/v1/models", reports.models),
    ("GET", "/v1/loads", reports.loads),
    ("GET", "/ready", reports.ready),
    ("GET", "/health", reports.health),
    ("GET", "/health_generate", reports.health),
    ("GET", "/server_info", reports.server_info),
    ("GET", "/get_server_info", reports.server_info),
    ("GET", "/model_info", reports.model_info),
    ("GET", "/get_model_info", reports.model_info),
    ("GET", "/metrics", reports.metrics),
)


@asynccontextmanager
async def emulated_runtime(config: EmulatedConfig, *, port: int = 0) -> AsyncIterator[str]:
    """Serve an emulated runtime as long as the context lasts; yields its URL. `port=0` takes a free one.

    Raises InputError (no such model, a port in use) or LaunchError (a package for cache events is missing).
    """
    codec = load_codec(config.model_path)
    async with publishing(config.kv_events) as publisher:
        engine = Engine(config.engine)
        driver = Driver(engine, publisher.publish, overhead_s=config.overhead_s)
        emulation = Emulation(config=config, codec=codec, driver=driver, publisher=publisher)
        async with _listening(_application(emulation), port) as url, _driven(driver):
            yield url


@asynccontextmanager
async def _driven(driver: Driver) -> AsyncIterator[None]:
    """Drive as long as the context lasts; if that fails, which is our mistake, the context's task fails."""
    owner = asyncio.current_task()
    assert owner is not None
    driving = asyncio.create_task(driver.run())
    driving.add_done_callback(lambda task: None if task.cancelled() else owner.cancel())
    try:
        yield
    finally:
        driving.cancel()
        await asyncio.wait([driving])
        if not driving.cancelled():
            owner.uncancel()
            driving.result()


def _application(emulation: Emulation) -> web.Application:
    app = web.Application(client_max_size=LARGEST_BODY, middlewares=[refuse_clearly])
    app[EMULATION] = emulation
    for method, path, handler in ENDPOINTS:
        app.router.add_route(method, path, handler)
    return app


@asynccontextmanager
async def _listening(app: web.Application, port: int) -> AsyncIterator[str]:
    """Listen as long as the context lasts. A client that hangs up cancels its call's handler."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0)
    await runner.setup()
    try:
        await _listen(runner, port)
        yield f"http://{HOST}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, port: int) -> None:
    try:
        await web.TCPSite(runner, HOST, port).start()
    except OSError as error:
        raise InputError(f"port {port} cannot be used ({error.strerror}): choose another") from None
