"""Stand-ins for what is behind a seam: a backend for programs, a runtime for the fleet."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from anyio.from_thread import start_blocking_portal

from preble_sgl.core import (
    Chunk,
    Completion,
    OnChunk,
    PlanHint,
    ProgramId,
    Request,
    RequestId,
    TokenIds,
    Usage,
    WorkerId,
    token_ids,
)
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.errors import RuntimeLost
from preble_sgl.runtime_ext.plugin.hints import Hint
from preble_sgl.runtime_ext.protocol import RuntimeInfo, Upstream

T = TypeVar("T")


class FakeBackend:
    """Answers every request with what `answer(prompt text)` returns, and remembers the requests."""

    def __init__(self, chat: ChatFormat, answer: Callable[[str], str] = lambda prompt: "fine") -> None:
        self.chat = chat
        self.requests: list[Request] = []
        self.outputs: list[TokenIds] = []
        self.hints: list[PlanHint] = []
        self.ended: list[ProgramId] = []
        self.given_back: list[int] = []
        self.pauses: list[float] = []
        self.logprobs: Callable[[TokenIds], float] = lambda choice: -1.0
        self.answer = answer

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Answer after the other tasks had their turn."""
        self.requests.append(request)
        await asyncio.sleep(0)
        if request.score_from is not None:
            return self._scored(request, request.score_from)
        text = self.answer(self.chat.decode(request.prompt))
        ids = self.chat.encode(text) + self.chat.encode(self.chat.assistant_end)[:1]
        self.outputs.append(ids)
        if on_chunk:
            on_chunk(Chunk(ids, text, "stop"), 0)
        return Completion(ids, text, "stop", Usage(len(request.prompt), 0, len(ids)))

    def _scored(self, request: Request, start: int) -> Completion:
        choice = request.prompt[start:]
        logprobs = tuple(self.logprobs(choice) for _ in choice)
        return Completion(token_ids(), "", "length", Usage(len(request.prompt), start - 1, 0), logprobs)

    def begin_program(self, hint: PlanHint) -> None:
        """Remember the hint."""
        self.hints.append(hint)

    def pause(self, program_id: ProgramId, expected_s: float) -> None:
        """Remember how long."""
        self.pauses.append(expected_s)

    def give_back(self, program_id: ProgramId, num_tokens: int) -> None:
        """Remember the tokens."""
        self.given_back.append(num_tokens)

    def end_program(self, program_id: ProgramId) -> None:
        """Remember the end."""
        self.ended.append(program_id)

    def call(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Run on a loop of its own."""
        with start_blocking_portal() as portal:
            return portal.call(fn)


class FakeRuntime:
    """A runtime that answers two tokens per request, waits when told to, and can die."""

    def __init__(self, worker_id: str) -> None:
        self.info = RuntimeInfo(
            worker_id=WorkerId(worker_id),
            url="",
            model_path="",
            version="0",
            device="cpu",
            kv_tokens=10_000,
            page_size=1,
            max_input_len=10_000,
        )
        self.served: list[RequestId] = []
        self.aborted: list[RequestId] = []
        self.flushes = 0
        self.dead = False
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.streaming = asyncio.Event()

    async def stream(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yield one token, wait for `may_finish`, yield the last."""
        self._require_alive()
        finished = False
        try:
            yield Chunk(token_ids([7]), "a")
            self.streaming.set()
            await self.may_finish.wait()
            self._require_alive()
            finished = True
            self.served.append(request.request_id)
            yield Chunk(token_ids([8]), "b", "stop", Usage(len(request.prompt), 0, 2))
        finally:
            if not finished:
                self.aborted.append(request.request_id)

    def hints_for(self, request: Request) -> Sequence[Hint]:
        """It has no plugin."""
        return ()

    def forward(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Upstream]:
        """It has no HTTP API."""
        raise NotImplementedError

    async def flush_cache(self) -> None:
        """Count the call."""
        self.flushes += 1

    def _require_alive(self) -> None:
        if self.dead:
            raise RuntimeLost(f"{self.info.worker_id} is dead", worker_id=self.info.worker_id)
