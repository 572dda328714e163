"""SGLang's own endpoints that change something: generate, abort, flush."""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web

from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.emulated.bodies import AbortBody, GenerateBody, parse
from preble_sgl.runtime_ext.emulated.driver import Answer
from preble_sgl.runtime_ext.emulated.emulation import EMULATION, Batch, finish_reason
from preble_sgl.runtime_ext.emulated.http_answers import DONE, event, json_response, open_stream

FLUSH_POLL_S = 0.02
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


async def generate(call: web.Request) -> web.StreamResponse:
    """Answer one prompt or a batch, as a whole or as a stream."""
    arrived_at = asyncio.get_running_loop().time()
    emulation = call.app[EMULATION]
    body = parse(GenerateBody, await call.read())
    wanted = body.wanted(emulation.codec)
    with emulation.answering(wanted, arrived_at, streams=body.stream) as batch:
        if body.stream:
            return await _stream(call, batch, body, incremental=emulation.config.incremental)
        await batch.wait_ended()
        answers = [_content(answer, 0, body) for answer in batch.answers]
        return json_response(answers if body.is_batch else answers[0])


async def abort_request(call: web.Request) -> web.Response:
    """End a request and, as SGLang, all whose ids begin with its id; ignore an id that is not there."""
    driver = call.app[EMULATION].driver
    body = parse(AbortBody, await call.read())
    if body.abort_all:
        driver.abort_beginning_with("")
    elif body.rid and driver.knows(body.rid):
        driver.abort_beginning_with(body.rid)
    return web.Response()


async def flush_cache(call: web.Request) -> web.Response:
    """Forget what is cached, at once or when idle within `timeout` seconds; refuse otherwise."""
    driver = call.app[EMULATION].driver
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _timeout_s(call.query)
    while not driver.flush_cache():
        if loop.time() >= deadline:
            return web.Response(text="Flush cache failed.\n", status=HTTPStatus.BAD_REQUEST)
        await asyncio.sleep(FLUSH_POLL_S)
    return web.Response(text=FLUSHED)


async def _stream(
    call: web.Request, batch: Batch, body: GenerateBody, *, incremental: bool
) -> web.StreamResponse:
    """Send everything so far at each step, or only what is new. A refusal comes as an event, as in SGLang."""
    response = await open_stream(call)
    sent = [0] * len(batch.answers)
    async for index, answer in batch.updates():
        content = _content(answer, sent[index] if incremental else 0, body)
        sent[index] = answer.num_ready
        await response.write(event(content | ({"index": index} if body.is_batch else {})))
    await response.write(DONE)
    return response


def _content(answer: Answer, start: int, body: GenerateBody) -> dict[str, Any]:
    """Return an answer from its token `start` on, as far as it has come."""
    if answer.refusal is not None:
        return {"error": _refusal(answer.refusal)}
    script, end = answer.script, answer.num_ready
    content = {
        "text": script.text[script.ends[start] : script.ends[end]],
        "output_ids": script.ids[start:end].tolist(),
        "meta_info": _meta_info(answer),
    }
    if body.return_prompt_token_ids:
        content["prompt_token_ids"] = answer.request.prompt.tolist()
    return content


def _refusal(message: str) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "code": 400, "retryable": False}


def _meta_info(answer: Answer) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": answer.request.request_id,
        "finish_reason": finish_reason(answer),
        "prompt_tokens": len(answer.request.prompt),
        "weight_version": "default",
        "num_retractions": answer.finished.num_retractions if answer.finished else 0,
        "reasoning_tokens": 0,
        "completion_tokens": answer.num_ready,
        "cached_tokens": answer.cached_tokens,
        "cached_tokens_details": _details(answer.cached_tokens),
        "dp_rank": None,
    }
    if answer.ended_at is not None:
        meta["e2e_latency"] = answer.ended_at - answer.arrived_at
    return meta


def _details(cached_tokens: int) -> dict[str, int] | None:
    return {"device": cached_tokens, "host": 0} if cached_tokens else None


def _timeout_s(query: Mapping[str, str]) -> float:
    try:
        timeout_s = float(query.get("timeout", "0"))
    except ValueError:
        timeout_s = -1
    if not timeout_s >= 0:
        raise InputError(f"timeout={query['timeout']}: must be seconds, 0 or more")
    return timeout_s
