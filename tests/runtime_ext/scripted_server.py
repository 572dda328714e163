"""A server that speaks SGLang's protocol and answers every `/generate` as a test scripts it."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

SETTINGS: Mapping[str, Any] = {
    "model_path": "/nowhere",
    "version": "scripted",
    "device": "cpu",
    "max_total_num_tokens": 1000,
    "page_size": 1,
    "max_req_input_len": 900,
}


def event(ids: list[int], text: str, finish: Mapping[str, Any] | None = None, **meta: object) -> bytes:
    """Return one event of an answer as SGLang sends it."""
    counts = {"prompt_tokens": 3, "cached_tokens": 2, "completion_tokens": len(ids)}
    answer = {"text": text, "output_ids": ids, "meta_info": {"finish_reason": finish} | counts | meta}
    return b"data: " + orjson.dumps(answer) + b"\n\n"


@dataclass
class ScriptedServer:
    """Sends `pieces` for each `/generate`, then hangs up. Keeps what it was sent."""

    pieces: list[bytes] = field(default_factory=list)
    status: int = 200
    settings: Mapping[str, Any] = field(default_factory=lambda: SETTINGS)
    ready: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    async def generate(self, call: web.Request) -> web.StreamResponse:
        self.bodies.append(await call.json())
        response = web.StreamResponse(status=self.status)
        await response.prepare(call)
        for piece in self.pieces:
            await response.write(piece)
        return response

    async def abort(self, call: web.Request) -> web.Response:
        self.aborted.append((await call.json())["rid"])
        return web.Response()

    async def server_info(self, call: web.Request) -> web.Response:
        return web.json_response(self.settings)

    async def is_ready(self, call: web.Request) -> web.Response:
        return web.Response(status=200 if self.ready else 503)


@asynccontextmanager
async def serving(server: ScriptedServer) -> AsyncIterator[str]:
    """Run the server on a free port and yield its URL."""
    app = web.Application()
    app.router.add_post("/generate", server.generate)
    app.router.add_post("/abort_request", server.abort)
    app.router.add_get("/server_info", server.server_info)
    app.router.add_get("/ready", server.is_ready)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
