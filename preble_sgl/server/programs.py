"""Which program run a request belongs to, so that its calls are scheduled together.

In this order: our own header; an id that clients send anyway, in a header or in the body; the conversation
that the request goes on with, as an earlier one had the same messages at its start. Ids are a tenant's own:
two tenants that send the same one do not meet.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

import orjson

from preble_sgl.core import ProgramId, new_request_id

HEADER = b"x-preble-program"
SESSION_HEADERS = (b"x-session-id", b"session-id", b"session_id", b"x-conversation-id", b"x-smg-routing-key")
BODY_IDS = ("prompt_cache_key", "session_id", "routing_key", "previous_response_id", "user")
MOST_CONVERSATIONS = 50_000
LONGEST_ID = 256

Clue: TypeAlias = str | list[bytes] | None
"""What a request says of its program: an id, or digests of the beginnings of its conversation, or nothing."""


class ProgramIds:
    """Knows the latest conversations."""

    def __init__(self, most: int = MOST_CONVERSATIONS) -> None:
        self._most = most
        self._conversations: OrderedDict[bytes, ProgramId] = OrderedDict()

    def of(self, tenant: str, clue: Clue) -> ProgramId:
        """Return the program run that a request belongs to; a new one if nothing says so."""
        if isinstance(clue, str):
            return program_id(tenant, clue)
        return self._inferred(clue) if clue else ProgramId(new_request_id())

    def _inferred(self, digests: list[bytes]) -> ProgramId:
        """Find the longest beginning of a conversation that was a request before. O(messages)."""
        found = next(
            (self._conversations[one] for one in reversed(digests) if one in self._conversations), None
        )
        program = found or ProgramId(f"conversation-{digests[-1].hex()}")
        self._conversations[digests[-1]] = program
        self._conversations.move_to_end(digests[-1])
        if len(self._conversations) > self._most:
            self._conversations.popitem(last=False)
        return program


def clue_of(tenant: str, headers: Mapping[bytes, bytes], body: Mapping[str, Any]) -> Clue:
    """Return what a request says of its program. O(bytes of messages)."""
    given = _given(headers, body)
    if given is not None:
        return given[:LONGEST_ID]
    messages = body.get("messages")
    return _digests(tenant, messages) if isinstance(messages, list) and messages else None


def program_id(tenant: str, given: str) -> ProgramId:
    """Return the scheduler's name for an id that a client gave."""
    return ProgramId(f"{tenant}/{given[:LONGEST_ID]}")


def _given(headers: Mapping[bytes, bytes], body: Mapping[str, Any]) -> str | None:
    for name in (HEADER, *SESSION_HEADERS):
        if value := headers.get(name):
            return value.decode("latin-1")
    values = (body.get(name) for name in BODY_IDS)
    return next((value for value in values if isinstance(value, str) and value), None)


def _digests(tenant: str, messages: list[Any]) -> list[bytes]:
    """Return a digest of each beginning of a conversation."""
    running, digests = hashlib.blake2b(tenant.encode(), digest_size=16), []
    for message in messages:
        running.update(orjson.dumps(message))
        digests.append(running.digest())
    return digests
