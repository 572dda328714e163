"""A server that speaks as much of SGLang's protocol as a calibration needs, and keeps exact accounts.

It computes nothing and waits for nothing: its engine time is what `cost` says of its prefills.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from preble_sgl.core import common_prefix_len, token_ids
from preble_sgl.runtime_ext.probe_points import Limits
from preble_sgl.sim.step_cost import StepCost

VERSION = "accounting"


@dataclass
class AccountingServer:
    """`num_foreign`: running requests of others; `foreign_tokens`: what they prefill beside each of ours."""

    cost: StepCost
    limits: Limits
    with_cache: bool = True
    one_at_a_time: bool = False
    num_foreign: int = 0
    foreign_tokens: int = 0
    accounts: bool = True
    flushes: int = 0
    prompts: list[bytes] = field(default_factory=list)
    prefilled_tokens: int = 0
    busy_us: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Account for one prefill of these prompts and return how many tokens of each were cached."""
        packed = [token_ids(prompt).tobytes() for prompt in prompts]
        cached = [self._cached_len(prompt) for prompt in packed]
        self.prompts += packed
        new_lens = [len(prompt) - known for prompt, known in zip(prompts, cached, strict=True)]
        if self.accounts:
            self.prefilled_tokens += sum(new_lens) + self.foreign_tokens
            lens = zip(new_lens, map(len, prompts), strict=True)
            self.busy_us += 1e6 * self.cost.seconds(list(lens))
        return cached

    def _cached_len(self, prompt: bytes) -> int:
        if not self.with_cache:
            return 0
        longest = max((common_prefix_len(prompt, known) for known in self.prompts), default=0)
        return min(longest, len(prompt) // 4 - 1)

    async def generate(self, call: web.Request) -> web.StreamResponse:
        body = await call.json()
        prompts = body["input_ids"]
        if isinstance(prompts[0], list):
            metas = [
                meta(prompt, known, 1) for prompt, known in zip(prompts, self.prefill(prompts), strict=True)
            ]
            return web.json_response([{"meta_info": one} for one in metas])
        async with self.turn if self.one_at_a_time else nullcontext():
            return await self._stream(call, prompts, body["sampling_params"]["max_new_tokens"])

    async def _stream(self, call: web.Request, prompt: list[int], num_tokens: int) -> web.StreamResponse:
        (cached,) = self.prefill([prompt])
        response = web.StreamResponse()
        await response.prepare(call)
        for count in range(min(1, num_tokens), num_tokens + 1):
            one = meta(prompt, cached, count) | {
                "finish_reason": {"type": "length"} if count == num_tokens else None
            }
            event = {"text": "", "output_ids": [1] if count else [], "meta_info": one}
            await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
            await asyncio.sleep(0.001)
        return response

    async def loads(self, call: web.Request) -> web.Response:
        load = {
            "num_running_reqs": self.num_foreign,
            "num_waiting_reqs": 0,
            "num_waiting_uncached_tokens": 0,
            "num_used_tokens": 0,
            "max_total_num_tokens": self.limits.kv_tokens,
            "total_prefill_uncached_tokens": self.prefilled_tokens,
            "total_prefill_busy_us": self.busy_us,
        }
        return web.json_response({"loads": [load]})

    async def flush(self, call: web.Request) -> web.Response:
        self.flushes += 1
        self.prompts.clear()
        return web.Response()

    async def server_info(self, call: web.Request) -> web.Response:
        return web.json_response(
            {
                "model_path": "/models/some-llama",
                "version": VERSION,
                "device": "cpu",
                "max_total_num_tokens": self.limits.kv_tokens,
                "page_size": 1,
                "max_req_input_len": self.limits.max_input_len,
                "chunked_prefill_size": self.limits.chunk_tokens,
                "incremental_streaming_output": True,
            }
        )


def meta(prompt: list[int], cached: int, num_tokens: int) -> dict[str, Any]:
    """Return the counts of one answer."""
    return {"prompt_tokens": len(prompt), "cached_tokens": cached, "completion_tokens": num_tokens}


@asynccontextmanager
async def accounting(server: AccountingServer) -> AsyncIterator[str]:
    """Run the server on a free port and yield its URL."""
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/generate", server.generate)
    app.router.add_post("/flush_cache", server.flush)
    app.router.add_get("/v1/loads", server.loads)
    app.router.add_get("/server_info", server.server_info)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
