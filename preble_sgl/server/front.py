"""The HTTP side of the routes that are placed: read a request, have it carried, answer.

A process may have many connections and no scheduler of its own: who carries is a `Carrier`.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

import orjson

from preble_sgl.core import RequestId, new_request_id
from preble_sgl.errors import InputError
from preble_sgl.server.access_log import log_answer
from preble_sgl.server.endpoints import Endpoint
from preble_sgl.server.errors import ApiError, told_or_logged
from preble_sgl.server.http import ClientGone, Limits, Receive, Reply, Scope, Send, read_body, wait_gone
from preble_sgl.server.programs import clue_of
from preble_sgl.server.prompts import Prompts
from preble_sgl.server.relay import Ask, Refused, Relay
from preble_sgl.server.tenants import Tenant, Tenants
from preble_sgl.server.traces import Traces, carried_on, end
from preble_sgl.server.wanted import Wanted

TIMEOUT_HEADER = b"x-request-timeout"
REQUEST_ID_HEADER = b"x-request-id"
CLIENT_GONE = 499
"""What is counted for a client that left, as nginx does; nobody is sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server treats its clients. `timeout_s`: for a request whose client gives none; None: no limit."""

    max_running: int = 2048
    max_waiting: int = 2048
    timeout_s: float | None = None
    limits: Limits = field(default_factory=Limits)


class Carrier(Protocol):
    """Has a scheduler, or reaches one."""

    async def carry(self, wanted: Wanted, work: Relay) -> None:
        """Wait for a turn, and do `work` where it is placed, in the time that it may take.

        Raises ApiError or what is `told` as one, and what `work` does.
        """
        ...

    def on_answer(self, path: str, status: int, tenant: str) -> None:
        """Count an answer, whatever it was."""
        ...


@dataclass(frozen=True, slots=True)
class Front:
    """Answers the requests of one process."""

    carrier: Carrier
    prompts: Prompts
    tenants: Tenants
    options: ServerOptions
    traces: Traces = field(default_factory=Traces)

    async def answer(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request of a route that is placed."""
        headers = dict(scope["headers"])
        begun_at, request_id = time.monotonic(), new_request_id()
        shown_id = headers.get(REQUEST_ID_HEADER, request_id.encode())[:128]
        reply = Reply(send, self.options.limits.stalled_s, [(REQUEST_ID_HEADER, shown_id)])
        tenant, ask = Tenant("unknown"), None
        span = self.traces.begin(endpoint.path, headers)
        try:
            tenant = self.tenants.of(_text(headers.get(b"authorization")))
            raw = await read_body(receive, self.options.limits)
            ask = await self._read(endpoint, tenant, headers, raw, request_id)
            relay = Relay(ask, reply, self.prompts.decode, carried_on(span))
            await _while_there(receive, reply, self.carrier.carry(ask.wanted, relay))
        except Refused as refused:
            await reply.whole(refused.status, refused.body, [])
        except ClientGone:
            reply.status = CLIENT_GONE
        except Exception as error:
            with suppress(ClientGone):
                await reply.refuse(told_or_logged(error, request_id))
        finally:
            self.carrier.on_answer(endpoint.path, reply.status or CLIENT_GONE, tenant.name)
            end(span, reply, tenant=tenant.name)
            log_answer(endpoint.path, reply, tenant, ask, time.monotonic() - begun_at)

    async def _read(
        self,
        endpoint: Endpoint,
        tenant: Tenant,
        headers: Mapping[bytes, bytes],
        raw: bytes,
        request_id: RequestId,
    ) -> Ask:
        """Return what a body asks. Raises InputError."""
        body = _parsed(raw, endpoint)
        if "kv_hints" in body and not tenant.is_admin:  # they pin prefixes, at the cost of everybody
            del body["kv_hints"]
            raw = orjson.dumps(body)
        fields, namespace = _namespaced(tenant, body)
        prompt = await endpoint.read_prompt(self.prompts, body)
        if not prompt:
            raise InputError("the prompt is empty: give a text or token ids")
        wanted = Wanted(
            request_id=request_id,
            path=endpoint.path,
            prompt=prompt.tobytes(),
            max_new_tokens=endpoint.max_new_tokens(body),
            tenant=tenant,
            namespace=namespace,
            clue=clue_of(tenant.name, headers, body),
            timeout_s=_timeout(headers.get(TIMEOUT_HEADER), self.options.timeout_s),
        )
        return Ask(endpoint=endpoint, wanted=wanted, raw=raw, body=body, fields=fields)


async def _while_there(receive: Receive, reply: Reply, work: Any) -> None:
    """Run `work` as long as the client is there. Raises ClientGone when it leaves before the end."""
    task = asyncio.current_task()
    assert task is not None, "a request is answered in a task"

    def leave(gone: "asyncio.Task[None]") -> None:
        if not gone.cancelled() and not reply.is_complete:
            task.cancel()

    gone = asyncio.create_task(wait_gone(receive))
    gone.add_done_callback(leave)
    try:
        await work
    except asyncio.CancelledError:
        if not gone.done() or gone.cancelled():
            raise
        task.uncancel()
        raise ClientGone("the client left") from None
    finally:
        gone.remove_done_callback(leave)
        gone.cancel()


def _parsed(raw: bytes, endpoint: Endpoint) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InputError("the body is not a JSON object")
    if endpoint.required and endpoint.required not in body:
        raise InputError(f"the body has no {endpoint.required}")
    return body


def _namespaced(tenant: Tenant, body: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what is to be set in the body so that a tenant's caches are its own, and their namespace.

    A salt of the client's divides its tenant's part further. SGLang's other name for one, `extra_key`, is
    not part of what runtimes tell of their caches, so it is made a salt, too.
    """
    given = [body.get(name) for name in ("cache_salt", "extra_key")]
    salts = [salt for salt in given if isinstance(salt, str) and salt]
    # No tenant's name begins with a slash, as a salt of one who shares does: it cannot name another's part.
    namespace = "/".join(salts if tenant.namespace is None else [tenant.namespace, *salts])
    if namespace == (body.get("cache_salt") or ""):
        return {}, namespace
    return {"cache_salt": namespace}, namespace


def _timeout(header: bytes | None, default_s: float | None) -> float | None:
    """Return the seconds that a request may take; never more than the server's own limit."""
    if header is None:
        return default_s
    try:
        asked_s = float(header)
    except ValueError:
        asked_s = 0.0
    if not asked_s > 0:
        raise ApiError(HTTPStatus.BAD_REQUEST, "x-request-timeout: give seconds, above 0")
    return asked_s if default_s is None else min(asked_s, default_s)


def _text(header: bytes | None) -> str | None:
    return None if header is None else header.decode("latin-1")
