"""Emulated runtimes for tests, and calls to them without any client library."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from preble_sgl.runtime_ext.emulated.config import EmulatedConfig
from preble_sgl.runtime_ext.emulated.server import emulated_runtime
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.step_cost import StepCost

QUICK_S, NEVER_S = 1e-4, 1e6
"""Seconds of an iteration: next to nothing, and longer than any test."""


def engine_config(step_s: float = QUICK_S, kv_tokens: int = 2000, **settings: Any) -> EngineConfig:
    return EngineConfig(
        step=StepCost(floor_s=step_s, base_s=0.0, token_s=0.0), kv_tokens=kv_tokens, **settings
    )


def config(
    step_s: float = QUICK_S, *, engine: Mapping[str, Any] | None = None, **settings: Any
) -> EmulatedConfig:
    return EmulatedConfig(engine=engine_config(step_s, **(engine or {})), profile="test", **settings)


@dataclass(frozen=True)
class Reply:
    """What came back. `events`: of a stream, in which a string stands for what is no JSON."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def events(self) -> list[Any]:
        lines = [line.removeprefix(b"data: ") for line in self.body.split(b"\n\n") if line]
        return [line.decode() if line == b"[DONE]" else orjson.loads(line) for line in lines]


@dataclass(frozen=True)
class Emulated:
    """One runtime that runs."""

    url: str
    session: aiohttp.ClientSession

    async def get(self, path: str) -> Reply:
        async with self.session.get(self.url + path) as response:
            return Reply(response.status, await response.read())

    async def post(self, path: str, **body: Any) -> Reply:
        return await self.post_bytes(path, orjson.dumps(body))

    async def post_bytes(self, path: str, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        async with self.session.post(self.url + path, data=body, headers=headers) as response:
            return Reply(response.status, await response.read())

    async def generate(self, *prompt: int, max_new_tokens: int = 4, **body: Any) -> Any:
        """Answer one prompt of ids, as one object."""
        params = {"max_new_tokens": max_new_tokens}
        return (await self.post("/generate", input_ids=prompt, sampling_params=params, **body)).json

    async def load(self) -> dict[str, Any]:
        load: dict[str, Any] = (await self.get("/v1/loads")).json["loads"][0]
        return load


@asynccontextmanager
async def running(given: EmulatedConfig | None = None) -> AsyncIterator[Emulated]:
    async with emulated_runtime(given or config()) as url, aiohttp.ClientSession() as session:
        yield Emulated(url, session)
