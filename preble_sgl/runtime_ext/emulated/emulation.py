"""The state of one emulated runtime, and the requests of one HTTP call on their way through it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from preble_sgl.core import ProgramId, Request, RequestId, SamplingParams, TokenIds
from preble_sgl.errors import InputError, RequestRejected
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig
from preble_sgl.runtime_ext.emulated.driver import Answer, Driver
from preble_sgl.runtime_ext.emulated.kv_publisher import Publisher
from preble_sgl.runtime_ext.emulated.text import Codec, script_for

PROGRAM = ProgramId("http")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One prompt to answer."""

    request_id: str
    prompt: TokenIds
    max_new_tokens: int
    namespace: str = ""
    priority: int = 0


@dataclass(slots=True, kw_only=True)
class Emulation:
    """Everything that the HTTP handlers share."""

    config: EmulatedConfig
    codec: Codec
    driver: Driver
    publisher: Publisher
    started_at: float = field(default_factory=time.time)

    @contextmanager
    def answering(self, wanted: Sequence[Wanted], arrived_at: float, *, streams: bool) -> Iterator["Batch"]:
        """Start the requests of one call, and abort those that are unfinished when the call ends.

        Raises InputError for an id in use, an empty prompt or a token that the model does not know.
        """
        if not all(one.prompt for one in wanted) or not wanted:
            raise InputError("the prompt is empty: give at least one token")
        batch = Batch(self.driver, arrived_at, streams)
        try:
            for one in wanted:
                batch.submit(self._request(one), self.codec)
            yield batch
        finally:
            batch.abandon()

    def _request(self, wanted: Wanted) -> Request:
        self._require_known_tokens(wanted.prompt)
        return Request(
            request_id=RequestId(wanted.request_id),
            program_id=PROGRAM,
            call_path=wanted.request_id,
            prompt=wanted.prompt,
            sampling=SamplingParams(max_new_tokens=wanted.max_new_tokens),
            namespace=wanted.namespace,
            priority=wanted.priority,
        )

    def _require_known_tokens(self, prompt: TokenIds) -> None:
        if min(prompt) < 0 or max(prompt) >= self.codec.num_ids:
            raise InputError(f"input_ids: there are only token ids from 0 to {self.codec.num_ids - 1}")


EMULATION = web.AppKey("emulation", Emulation)


class Batch:
    """The answers to the prompts of one call. They share one event, as one task waits for all of them."""

    def __init__(self, driver: Driver, arrived_at: float, streams: bool) -> None:
        self.answers: list[Answer] = []
        self._driver = driver
        self._arrived_at = arrived_at
        self._streams = streams
        self._news = asyncio.Event()

    def submit(self, request: Request, codec: Codec) -> None:
        """Start one request."""
        room = max(0, self._driver.max_input_len + 1 - len(request.prompt))
        script = script_for(request.prompt, min(request.sampling.max_new_tokens, room), codec.words)
        answer = Answer(request, script, self._news, self._streams, self._arrived_at)
        self._driver.submit(answer)
        self.answers.append(answer)

    async def updates(self) -> AsyncIterator[tuple[int, Answer]]:
        """Yield each answer, with its index, whenever there is more of it, until all have ended."""
        open_ones = dict(enumerate(self.answers))
        told = [0] * len(self.answers)
        while open_ones:
            await self._news.wait()
            self._news.clear()
            for index, answer in list(open_ones.items()):
                if answer.ended_at is not None:
                    del open_ones[index]
                elif answer.num_ready == told[index]:
                    continue
                told[index] = answer.num_ready
                yield index, answer

    async def wait_ended(self) -> None:
        """Wait until all have ended. Raises RequestRejected if one was refused."""
        async for _, answer in self.updates():
            require_accepted(answer)

    def abandon(self) -> None:
        """Abort whatever is unfinished."""
        for answer in self.answers:
            if answer.ended_at is None:
                self._driver.abort(answer.request.request_id)


def require_accepted(answer: Answer) -> None:
    """Raise RequestRejected if the engine has refused the request."""
    if answer.refusal is not None:
        raise RequestRejected(answer.refusal, request_id=answer.request.request_id)


def finish_reason(answer: Answer) -> dict[str, Any] | None:
    """Return why an answer ended, as SGLang writes it, or None while it goes on."""
    if answer.is_aborted:
        return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    if answer.finished is None:
        return None
    return {"type": answer.finished.finish_reason, "length": answer.num_ready}
