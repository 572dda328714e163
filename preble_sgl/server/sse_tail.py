"""Pass server-sent events of an OpenAI stream through, and learn the usage that comes at their end.

The server asks every runtime for the usage, as it has to know how many tokens were cached. The event with it
has no choices; a client that did not ask for it does not get it. Nothing else is parsed: bytes that end with
an event and cannot hold that one go through as they are. Inside JSON texts a quote is escaped, so the bytes
that are looked for occur nowhere else.
"""

from typing import Any

import orjson

from preble_sgl.core import Usage

END = b"\n\n"
NO_CHOICES = b'"choices":[]'


class SseTail:
    """The stream of one answer on its way to the client. `keep`: whether it asked for the usage itself."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._rest = b""
        self.usage: Usage | None = None
        self.num_events = 0

    def feed(self, data: bytes) -> bytes:
        """Take what came, cut anywhere; return what the client gets now."""
        data = self._rest + data if self._rest else data
        end = data.rfind(END) + len(END) if END in data else 0
        self._rest, whole = data[end:], data[:end]
        self.num_events += whole.count(END)
        return whole if NO_CHOICES not in whole else self._without_usage(whole)

    def close(self) -> bytes:
        """Return what is left when the stream ended in the middle of an event."""
        rest, self._rest = self._rest, b""
        return rest

    def _without_usage(self, whole: bytes) -> bytes:
        events = [event + END for event in whole.split(END)[:-1]]
        return b"".join(event for event in events if not self._is_usage(event) or self._keep)

    def _is_usage(self, event: bytes) -> bool:
        usage = _usage_in(event) if NO_CHOICES in event else None
        if usage is not None:
            self.usage = usage
        return usage is not None


def _usage_in(event: bytes) -> Usage | None:
    """Return the usage that an event tells; None for one that is something else."""
    try:
        content = orjson.loads(event.removeprefix(b"data:"))
    except orjson.JSONDecodeError:
        return None
    return usage_of(content["usage"]) if isinstance(content, dict) and content.get("usage") else None


def usage_of(told: dict[str, Any]) -> Usage:
    """Return the token counts of an OpenAI answer."""
    details = told.get("prompt_tokens_details") or {}
    prompt_tokens = told.get("prompt_tokens") or 0
    cached = min(details.get("cached_tokens") or 0, prompt_tokens)
    return Usage(prompt_tokens, cached, told.get("completion_tokens") or 0)
