"""The OpenAI endpoints as SGLang has them: completions and chat completions, whole or streamed."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from preble_sgl.core import Usage
from preble_sgl.runtime_ext.emulated.bodies import ChatBody, CompletionBody, parse
from preble_sgl.runtime_ext.emulated.driver import Answer
from preble_sgl.runtime_ext.emulated.emulation import EMULATION, Batch, finish_reason, require_accepted
from preble_sgl.runtime_ext.emulated.http_answers import DONE, event, json_response, open_stream

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Shape:
    """How an endpoint writes an answer: as a whole, or what opens a stream, each piece, what closes it."""

    name: str
    chunk_name: str
    whole: Callable[[str], Fields]
    delta: Callable[[str], Fields]
    opens: Fields | None
    closes: Fields | None
    each_chunk: Fields


CHAT = _Shape(
    name="chat.completion",
    chunk_name="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text, "reasoning_content": None}},
    delta=lambda text: {"delta": {"content": text, "reasoning_content": None}},
    opens={"delta": {"role": "assistant", "content": "", "reasoning_content": None}},
    closes={"delta": {"reasoning_content": None}},
    each_chunk={},
)
COMPLETION = _Shape(
    name="text_completion",
    chunk_name="text_completion",
    whole=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    opens=None,
    closes=None,
    each_chunk={"usage": None},
)


async def chat_completions(call: web.Request) -> web.StreamResponse:
    """Go on with a conversation."""
    return await _answer(call, ChatBody, CHAT)


async def completions(call: web.Request) -> web.StreamResponse:
    """Go on with one prompt or several."""
    return await _answer(call, CompletionBody, COMPLETION)


async def _answer(
    call: web.Request, kind: type[ChatBody] | type[CompletionBody], shape: _Shape
) -> web.StreamResponse:
    arrived_at = asyncio.get_running_loop().time()
    emulation = call.app[EMULATION]
    body = parse(kind, await call.read())
    model = body.model or emulation.config.served_name
    with emulation.answering(body.wanted(emulation.codec), arrived_at, streams=body.stream) as batch:
        writer = _Writer(shape, batch, model)
        if body.stream:
            return await writer.stream(call, with_usage=body.includes_usage)
        await batch.wait_ended()
        return json_response(writer.whole())


class _Writer:
    """Writes the answers of one call."""

    def __init__(self, shape: _Shape, batch: Batch, model: str) -> None:
        self._shape = shape
        self._batch = batch
        self._common = {
            "id": batch.answers[0].request.request_id,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self) -> Fields:
        """Return all answers as one object."""
        choices = [
            self._choice(index, self._shape.whole(answer.script.text[: answer.script.ends[answer.num_ready]]))
            | _ending(answer)
            for index, answer in enumerate(self._batch.answers)
        ]
        return self._common | {
            "object": self._shape.name,
            "choices": choices,
            "usage": _usage(self._batch.answers) | {"completion_tokens_details": None},
            "metadata": {"weight_version": "default"},
        }

    async def stream(self, call: web.Request, *, with_usage: bool) -> web.StreamResponse:
        """Send each answer's pieces as they come. A refusal is an HTTP error, as nothing was sent before."""
        response: web.StreamResponse | None = None
        sent: dict[int, int] = {}
        async for index, answer in self._batch.updates():
            require_accepted(answer)
            response = response or await open_stream(call)
            pieces = self._pieces(index, answer, sent.get(index))
            sent[index] = answer.num_ready
            await response.write(b"".join(map(event, pieces)))
        assert response is not None, "every answer ends, and its end is an update"
        if with_usage:
            await response.write(event(self._chunk([]) | {"usage": _usage(self._batch.answers)}))
        await response.write(DONE)
        return response

    def _pieces(self, index: int, answer: Answer, sent: int | None) -> list[Fields]:
        """Return the chunks for what is new of an answer; `sent` is None before its first."""
        shape, script = self._shape, answer.script
        text = script.text[script.ends[sent or 0] : script.ends[answer.num_ready]]
        closing = _ending(answer) if answer.ended_at is not None else {}
        pieces = [shape.opens] if shape.opens and sent is None else []
        if shape.closes is None:
            pieces.append(shape.delta(text) | closing)
        else:
            pieces += [shape.delta(text)] if text else []
            pieces += [shape.closes | closing] if closing else []
        return [self._chunk([self._choice(index, piece)]) for piece in pieces]

    def _chunk(self, choices: list[Fields]) -> Fields:
        return self._common | {"object": self._shape.chunk_name, "choices": choices} | self._shape.each_chunk

    def _choice(self, index: int, content: Fields) -> Fields:
        return {"index": index, "logprobs": None, "finish_reason": None, "matched_stop": None} | content


def _ending(answer: Answer) -> Fields:
    reason = finish_reason(answer)
    assert reason is not None, "an answer that ended has a reason"
    return {"finish_reason": reason["type"]}


def _usage(answers: Sequence[Answer]) -> Fields:
    total = sum(
        (Usage(len(one.request.prompt), one.cached_tokens, one.num_ready) for one in answers), Usage()
    )
    return {
        "prompt_tokens": total.prompt_tokens,
        "total_tokens": total.prompt_tokens + total.output_tokens,
        "completion_tokens": total.output_tokens,
        "prompt_tokens_details": {"cached_tokens": total.cached_tokens},
        "reasoning_tokens": 0,
    }
