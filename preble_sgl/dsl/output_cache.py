"""One answer for equal calls: a deterministic call that was made before in the batch is not made again.

Not to be confused with the reuse of KV: that saves computing a prompt, this saves the call. Both are counted
apart: an answer from here has no tokens and says `is_duplicate`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import replace
from typing import TypeVar

from preble_sgl.core import Chunk, Completion, OnChunk, PlanHint, ProgramId, Request, Usage
from preble_sgl.dsl.backend import Backend
from preble_sgl.dsl.chat import ChatFormat

T = TypeVar("T")


class OutputCache:
    """A backend that asks another one, but once only for equal greedy calls."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._answers: dict[Hashable, asyncio.Future[Completion | None]] = {}
        self.begin_program: Callable[[PlanHint], None] = backend.begin_program
        self.pause: Callable[[ProgramId, float], None] = backend.pause
        self.give_back: Callable[[ProgramId, int], None] = backend.give_back
        self.end_program: Callable[[ProgramId], None] = backend.end_program

    @property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template of the model behind the backend."""
        return self._backend.chat

    async def generate(self, request: Request, on_chunk: OnChunk | None = None) -> Completion:
        """Answer from an equal call, made before or under way; if that fails, by a call of its own."""
        if request.sampling.temperature != 0:
            return await self._backend.generate(request, on_chunk)
        key = _key(request)
        while (answer := self._answers.get(key)) is not None:
            done = await asyncio.shield(answer)
            if done is not None:
                if on_chunk:
                    on_chunk(Chunk(done.output_ids, done.text, done.finish_reason), 0)
                return replace(done, usage=Usage(), is_duplicate=True)
        return await self._ask(key, request, on_chunk)

    async def _ask(self, key: Hashable, request: Request, on_chunk: OnChunk | None) -> Completion:
        answer = self._answers[key] = asyncio.get_running_loop().create_future()
        try:
            done = await self._backend.generate(request, on_chunk)
        except BaseException:
            del self._answers[key]
            answer.set_result(None)
            raise
        answer.set_result(done)
        return done

    def call(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Run `fn` on the event loop that owns the backend."""
        return self._backend.call(fn)


def _key(request: Request) -> Hashable:
    """Return what makes two greedy calls equal."""
    asked = (request.prompt.tobytes(), request.score_from, request.num_top_logprobs)
    return (*asked, replace(request.sampling, seed=None), request.images, request.namespace)
