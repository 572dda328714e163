"""Carry one request to the runtime where it was placed, and its answer back, bytes as they are.

It is the `Work` of a call: lost with a runtime before the first byte, it is done again on another. A stream
that breaks off later goes on where another runtime can say the rest (`resuming.py`).
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import orjson

from preble_sgl.attempts import Outcome
from preble_sgl.core import FinishReason, Placement, ProgramId, Usage, token_ids
from preble_sgl.errors import RequestRejected, RuntimeFaulty, RuntimeLost
from preble_sgl.runtime_ext.protocol import Forwards, Upstream
from preble_sgl.server.endpoints import Endpoint, with_fields
from preble_sgl.server.errors import BrokenOff
from preble_sgl.server.http import EVENTS, Headers, Reply, header_value
from preble_sgl.server.resuming import Resuming, Sent, can_go_on, resuming_of
from preble_sgl.server.sse_tail import SseTail
from preble_sgl.server.wanted import Wanted


class Way(Protocol):
    """Where a request was placed, and what to tell of it: an `Attempt`, or one of another process."""

    @property
    def runtime(self) -> Forwards: ...
    @property
    def placement(self) -> Placement: ...
    @property
    def program_id(self) -> ProgramId: ...
    @property
    def priority(self) -> int | None: ...
    @property
    def kv_hints(self) -> dict[str, Any] | None: ...
    @property
    def first_token_in_s(self) -> float: ...
    @property
    def tells_new_only(self) -> bool: ...
    @property
    def on_first_token(self) -> Callable[[], None]: ...
    @property
    def assume_first_token(self) -> Callable[[], None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request as it came: `raw` bytes, `body` parsed. `fields` are set in it for the runtime."""

    endpoint: Endpoint
    wanted: Wanted
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

    def sent(self, way: Way, more: Mapping[str, Any]) -> bytes:
        """Return the body for a runtime. `more`: what is to be set in it for this attempt."""
        fields = dict(self.fields)
        if way.priority is not None:
            fields["priority"] = way.priority
        if hints := way.kv_hints:
            fields["kv_hints"] = hints
        if self.streams and not self.endpoint.is_native and not self.wants_usage:
            options = self.body.get("stream_options")
            given = options if isinstance(options, dict) else {}
            fields["stream_options"] = {**given, "include_usage": True}
        return with_fields(self.raw, self.body, {**fields, **more})


class Refused(RequestRejected):
    """A runtime's refusal, to be passed on as it is."""

    def __init__(self, status: int, body: bytes, wanted: Wanted) -> None:
        super().__init__(f"the runtime refused it (HTTP {status})", request_id=wanted.request_id)
        self.status = status
        self.body = body


class Faulted(Refused, RuntimeFaulty):
    """A runtime's failure, to be passed on if it fails again."""


class Relay:
    """One request on its way. `decode`: the text of tokens. `headers`: what the runtime gets besides."""

    def __init__(
        self, ask: Ask, reply: Reply, decode: Callable[[Any], str], headers: Mapping[str, str]
    ) -> None:
        self._ask = ask
        self._reply = reply
        self._decode = decode
        self._headers = headers
        self._sent = Sent(keeps_all=ask.streams and can_go_on(ask.endpoint, ask.body))

    @property
    def num_tokens(self) -> int:
        """How much the client has of a stream: what was said by a lost runtime counts as progress."""
        return self._sent.num_parts

    async def run(self, way: Way) -> Outcome:
        """Do it on one runtime. Raises Refused, RuntimeLost, or ClientGone for one who does not read."""
        if self._ask.streams:
            return await self._carry(way)
        if self._reply.has_begun:
            raise BrokenOff("the runtime was lost in the middle of the answer")
        loop = asyncio.get_running_loop()
        expected = loop.call_later(way.first_token_in_s, way.assume_first_token)
        try:
            return await self._carry(way)
        finally:
            expected.cancel()

    async def _carry(self, way: Way) -> Outcome:
        resuming = self._resuming(way)
        body = self._ask.sent(way, resuming.fields if resuming else {})
        path = self._ask.endpoint.path.lstrip("/")
        async with way.runtime.forward("POST", path, body, headers=self._headers) as upstream:
            if upstream.status != HTTPStatus.OK:
                error = Faulted if upstream.status == HTTPStatus.INTERNAL_SERVER_ERROR else Refused
                raise error(upstream.status, await upstream.read(), self._ask.wanted)
            if self._ask.streams:
                return await self._stream(way, upstream, resuming)
            return await self._whole(way, upstream)

    def _resuming(self, way: Way) -> Resuming | None:
        """Return how to go on with a stream that has begun. Raises BrokenOff if it cannot."""
        ask = self._ask
        if not self._reply.has_begun:
            self._sent.tells_new_only = way.tells_new_only
            return None
        resuming = resuming_of(
            ask.endpoint, ask.wanted, ask.body, self._sent, self._decode, way.tells_new_only
        )
        if resuming is None:
            raise BrokenOff("the runtime was lost in the middle of the answer")
        return resuming

    async def _whole(self, way: Way, upstream: Upstream) -> Outcome:
        body = await upstream.read()
        usage, finish_reason = self._ask.endpoint.usage(orjson.loads(body))
        cached = (b"x-preble-cached-tokens", str(usage.cached_tokens).encode())
        await self._reply.whole(HTTPStatus.OK, body, [*_headers(way), cached])
        return self._outcome(usage, finish_reason)

    async def _stream(self, way: Way, upstream: Upstream, resuming: Resuming | None) -> Outcome:
        tail = SseTail(keep=self._ask.wants_usage)
        async for data in upstream.content.iter_any():
            way.on_first_token()
            if not self._reply.has_begun:
                await self._reply.begin(HTTPStatus.OK, EVENTS, _headers(way))
            ready = tail.feed(data)
            if ready := resuming.feed(ready) if resuming else ready:
                self._sent.add(ready)
                await self._reply.write(ready)
        if not self._reply.has_begun:
            raise RuntimeLost("the answer broke off before its first byte")
        await self._reply.write(tail.close(), more=False)
        return self._outcome(tail.usage or self._native_usage(), "stop")

    def _native_usage(self) -> Usage:
        """Return what the last event of SGLang's own stream says."""
        last = self._sent.last_event() if self._ask.endpoint.is_native else None
        return self._ask.endpoint.usage(last)[0] if last else Usage()

    def _outcome(self, usage: Usage, finish_reason: FinishReason) -> Outcome:
        prompt_len = self._ask.wanted.num_prompt_tokens
        seen = Usage(prompt_len, min(usage.cached_tokens, prompt_len), usage.output_tokens)
        return Outcome(token_ids(), seen, finish_reason)


def _headers(way: Way) -> Headers:
    placement = way.placement
    return [
        (b"x-preble-worker", placement.worker_id.encode()),
        (b"x-preble-matched-tokens", str(placement.matched_len).encode()),
        (b"x-preble-reason", placement.reason.encode()),
        (b"x-preble-program", header_value(way.program_id)),
    ]
