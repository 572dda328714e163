"""Carry one request to the runtime where it was placed, and its answer back, bytes as they are.

It is the `Work` of a call: lost with a runtime before the first byte, it is done again on another.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson

from preble_sgl.core import FinishReason, Request, Usage, token_ids
from preble_sgl.dispatcher import Attempt, Outcome
from preble_sgl.errors import RequestRejected, RuntimeLost
from preble_sgl.runtime_ext.plugin.hints import envelope
from preble_sgl.runtime_ext.protocol import Upstream
from preble_sgl.server.endpoints import Endpoint, with_fields
from preble_sgl.server.errors import BrokenOff
from preble_sgl.server.http import EVENTS, Headers, Reply
from preble_sgl.server.sse_tail import SseTail


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request as it came: `raw` bytes, `body` parsed. `fields` are set in it for the runtime."""

    endpoint: Endpoint
    request: Request
    raw: bytes
    body: Mapping[str, Any]
    fields: Mapping[str, Any]

    @property
    def streams(self) -> bool:
        """Whether the answer is to come as server-sent events."""
        return self.body.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        """Whether the client asked for the usage at the end of the stream."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def sent(self, attempt: Attempt) -> bytes:
        """Return the body for a runtime."""
        fields = dict(self.fields)
        if attempt.priority is not None:
            fields["priority"] = attempt.priority
        if hints := attempt.runtime.hints_for(self.request):
            fields["kv_hints"] = envelope(self.request.request_id, hints)
        if self.streams and not self.endpoint.is_native and not self.wants_usage:
            options = self.body.get("stream_options")
            given = options if isinstance(options, dict) else {}
            fields["stream_options"] = {**given, "include_usage": True}
        return with_fields(self.raw, self.body, fields)


class Refused(RequestRejected):
    """A runtime's refusal, to be passed on as it is."""

    def __init__(self, status: int, body: bytes, request: Request) -> None:
        super().__init__(f"the runtime refused it (HTTP {status})", request_id=request.request_id)
        self.status = status
        self.body = body


class Relay:
    """One request on its way."""

    def __init__(self, ask: Ask, reply: Reply) -> None:
        self._ask = ask
        self._reply = reply

    @property
    def num_tokens(self) -> int:
        """1 once the client has something: then it cannot be done again."""
        return int(self._reply.has_begun)

    async def run(self, attempt: Attempt) -> Outcome:
        """Do it on one runtime. Raises Refused, RuntimeLost, or ClientGone for one who does not read."""
        if self._reply.has_begun:
            raise BrokenOff("the runtime was lost in the middle of the answer")
        if self._ask.streams:
            return await self._carry(attempt)
        loop = asyncio.get_running_loop()
        expected = loop.call_later(attempt.first_token_in_s, attempt.assume_first_token)
        try:
            return await self._carry(attempt)
        finally:
            expected.cancel()

    async def _carry(self, attempt: Attempt) -> Outcome:
        body = self._ask.sent(attempt)
        async with attempt.runtime.forward("POST", self._ask.endpoint.path.lstrip("/"), body) as upstream:
            if upstream.status != HTTPStatus.OK:
                raise Refused(upstream.status, await upstream.read(), self._ask.request)
            carry = self._stream if self._ask.streams else self._whole
            return await carry(attempt, upstream)

    async def _whole(self, attempt: Attempt, upstream: Upstream) -> Outcome:
        body = await upstream.read()
        usage, finish_reason = self._ask.endpoint.usage(orjson.loads(body))
        cached = (b"x-preble-cached-tokens", str(usage.cached_tokens).encode())
        await self._reply.whole(HTTPStatus.OK, body, [*self._headers(attempt), cached])
        return self._outcome(usage, finish_reason)

    async def _stream(self, attempt: Attempt, upstream: Upstream) -> Outcome:
        tail, last = SseTail(keep=self._ask.wants_usage), b""
        async for data in upstream.content.iter_any():
            if not self._reply.has_begun:
                attempt.on_first_token()
                await self._reply.begin(HTTPStatus.OK, EVENTS, self._headers(attempt))
            if ready := tail.feed(data):
                last = ready if b"data: {" in ready else last
                await self._reply.write(ready)
        if not self._reply.has_begun:
            raise RuntimeLost("the answer broke off before its first byte")
        await self._reply.write(tail.close(), more=False)
        return self._outcome(tail.usage or self._native_usage(last), "stop")

    def _native_usage(self, last: bytes) -> Usage:
        """Return what the last event of SGLang's own stream says."""
        events = [event for event in last.split(b"\n\n") if event.startswith(b"data: {")]
        return self._ask.endpoint.usage(orjson.loads(events[-1][6:]))[0] if events else Usage()

    def _outcome(self, usage: Usage, finish_reason: FinishReason) -> Outcome:
        prompt_len = len(self._ask.request.prompt)
        seen = Usage(prompt_len, min(usage.cached_tokens, prompt_len), usage.output_tokens)
        return Outcome(token_ids(), seen, finish_reason)

    def _headers(self, attempt: Attempt) -> Headers:
        placement = attempt.placement
        return [
            (b"x-preble-worker", placement.worker_id.encode()),
            (b"x-preble-matched-tokens", str(placement.matched_len).encode()),
            (b"x-preble-reason", placement.reason.encode()),
        ]
