"""Programs against a fleet that another process serves: `ps.Fleet.connect(url)`.

Calls go as token ids to the server's `/generate`, with the program run they belong to; what is known of a
program run goes ahead of its first call. The server places, as if the program ran beside it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson

from preble_sgl.answering import Answering
from preble_sgl.core import Completion, OnChunk, PlanHint, ProgramId, Request
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.errors import PrebleError, RuntimeLost
from preble_sgl.opening import OnLoop, Opening
from preble_sgl.runtime_ext.client import SglangRuntime

MAX_FRUITLESS = 3
"""Attempts in a row without a token after which a call fails."""
PAUSE_S = 0.5


class _Server(SglangRuntime):
    """The server as a runtime: it speaks SGLang's API."""

    def headers_of(self, request: Request) -> Mapping[str, str]:
        return {"x-preble-program": request.program_id}


class RemoteFleet(OnLoop):
    """A fleet behind a server. It is a `dsl.backend.Backend`."""

    def __init__(self, server: _Server, chat: ChatFormat) -> None:
        self._server = server
        self._chat = chat
        self._telling: dict[ProgramId, asyncio.Task[None]] = {}

    @classmethod
    def connect(
        cls, url: str, *, model_path: str | Path | None = None, api_key: str | None = None
    ) -> "Opening[RemoteFleet]":
        """Use the server at `url` for as long as the context lasts; see `Fleet.connect`."""

        @asynccontextmanager
        async def opened() -> AsyncIterator[RemoteFleet]:
            async with _Server.attach(url, api_key=api_key) as server:
                fleet = cls(server, ChatFormat.load(model_path or server.info.model_path))
                try:
                    yield fleet
                finally:
                    await asyncio.gather(*fleet._telling.values(), return_exceptions=True)

        return Opening(opened)

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template of the fleet's model."""
        return self._chat

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Answer one request; one that breaks off goes on with the tokens that it has.

        Cancelling aborts it. Raises RequestRejected, or RuntimeLost when the server is gone.
        """
        if telling := self._telling.get(request.program_id):
            await asyncio.wait([telling])
        answering = Answering(request, self._chat.decode, on_chunk)
        num_fruitless = 0
        while True:
            num_before = answering.num_tokens
            try:
                async for chunk in self._server.stream(answering.next_request()):
                    answering.take(chunk)
                return answering.completion()
            except RuntimeLost:
                num_fruitless = 0 if answering.num_tokens > num_before else num_fruitless + 1
                if num_fruitless >= MAX_FRUITLESS:
                    raise
                await asyncio.sleep(PAUSE_S * num_fruitless)

    def begin_program(self, hint: PlanHint) -> None:
        """Tell the server that a program run begins, and what is known of it."""
        deadline_s = None
        if hint.deadline_at is not None:
            deadline_s = max(1e-3, hint.deadline_at - time.monotonic())
        plan = {
            "program_id": hint.program_id,
            "kv_tokens": hint.kv_tokens,
            "prefixes": [prefix.tolist() for prefix in hint.prefixes],
            "deadline_s": deadline_s,
        }
        self._tell(hint.program_id, "POST", "v1/programs", plan)

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Tell the server that a program run makes no call for about so many seconds."""
        self._tell(program_id, "POST", f"{_path(program_id)}/pause", {"expected_s": expected_s})

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Tell the server that a program run will not use so many tokens of its KV again."""
        self._tell(program_id, "POST", f"{_path(program_id)}/give_back", {"num_tokens": num_tokens})

    def end_program(self, program_id: ProgramId) -> None:
        """Tell the server that a program run makes no more calls."""
        last = self._tell(program_id, "DELETE", _path(program_id))
        last.add_done_callback(lambda task: self._forget(program_id, task))

    def _tell(self, program_id: ProgramId, method: str, path: str, body: Any = None) -> "asyncio.Task[None]":
        """Send what a program run does, in order; it is advice, so that a failure costs time only."""
        before = self._telling.get(program_id)

        async def told() -> None:
            if before is not None:
                await asyncio.wait([before])
            raw = None if body is None else orjson.dumps(body)
            with suppress(PrebleError):
                async with self._server.forward(method, path, raw) as answer:
                    await answer.read()

        task = self._telling[program_id] = asyncio.create_task(told())
        return task

    def _forget(self, program_id: ProgramId, last: "asyncio.Task[None]") -> None:
        if self._telling.get(program_id) is last:
            del self._telling[program_id]


def _path(program_id: ProgramId) -> str:
    return f"v1/programs/{quote(program_id, safe='')}"
