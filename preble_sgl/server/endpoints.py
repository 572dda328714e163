"""The routes that are placed: how to read their bodies, and what to add to them."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from preble_sgl.core import FinishReason, TokenIds, Usage
from preble_sgl.errors import InputError
from preble_sgl.server.prompts import (
    Prompts,
    chat_prompt,
    completion_prompt,
    embedding_prompt,
    generate_prompt,
)
from preble_sgl.server.sse_tail import usage_of

LIMITS = ("max_completion_tokens", "max_tokens")
SGLANG_MOST_TOKENS = 128
OPENAI_MOST_TOKENS = 16
CHAT_MOST_TOKENS = 1024
"""What a chat without a limit is taken to need; it ends by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One route. `most_tokens`: of an answer whose request sets no limit."""

    path: str
    summary: str
    read_prompt: Callable[[Prompts, Mapping[str, Any]], Awaitable[TokenIds]]
    required: str
    most_tokens: int
    is_native: bool = False

    def max_new_tokens(self, body: Mapping[str, Any]) -> int:
        """Return how long an answer may get, in tokens. Raises InputError."""
        params = body.get("sampling_params") if self.is_native else body
        names = ("max_new_tokens",) if self.is_native else LIMITS
        given = params if isinstance(params, Mapping) else {}
        limit = next((given[name] for name in names if given.get(name) is not None), self.most_tokens)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise InputError(f"{names[-1]}={limit!r}: must be a whole number, 0 or more")
        return min(limit, 2**31 - 1)

    def usage(self, answer: Any) -> tuple[Usage, FinishReason]:
        """Return what a whole answer says of its cost."""
        if not isinstance(answer, (dict, list)):
            return Usage(), "stop"
        return _native_usage(answer) if self.is_native else _openai_usage(answer)


def _native_usage(answer: Any) -> tuple[Usage, FinishReason]:
    metas = [one.get("meta_info", {}) for one in (answer if isinstance(answer, list) else [answer])]
    total = Usage()
    for meta in metas:
        total += Usage(
            meta.get("prompt_tokens", 0), meta.get("cached_tokens", 0), meta.get("completion_tokens", 0)
        )
    finish = (metas[-1].get("finish_reason") or {}) if metas else {}
    return total, _reason(finish.get("type"))


def _openai_usage(answer: Any) -> tuple[Usage, FinishReason]:
    if not isinstance(answer, dict):
        return Usage(), "stop"
    choices = answer.get("choices") or [{}]
    return usage_of(answer.get("usage") or {}), _reason(choices[0].get("finish_reason"))


def _reason(told: Any) -> FinishReason:
    return "length" if told == "length" else "abort" if told == "abort" else "stop"


def with_fields(raw: bytes, body: Mapping[str, Any], fields: Mapping[str, Any]) -> bytes:
    """Return the body of an object with `fields` set; everything else stays byte for byte if it can."""
    if not fields:
        return raw
    if any(name in body for name in fields):
        return orjson.dumps({**body, **fields})
    inner = orjson.dumps(fields)[1:-1]
    return b"{" + inner + (b"," if body else b"") + raw[raw.index(b"{") + 1 :]


CHAT = Endpoint(
    path="/v1/chat/completions",
    summary="Go on with a conversation",
    read_prompt=chat_prompt,
    required="messages",
    most_tokens=CHAT_MOST_TOKENS,
)
COMPLETIONS = Endpoint(
    path="/v1/completions",
    summary="Go on with a text",
    read_prompt=completion_prompt,
    required="prompt",
    most_tokens=OPENAI_MOST_TOKENS,
)
EMBEDDINGS = Endpoint(
    path="/v1/embeddings",
    summary="Embed texts",
    read_prompt=embedding_prompt,
    required="input",
    most_tokens=0,
)
GENERATE = Endpoint(
    path="/generate",
    summary="SGLang's own way to generate",
    read_prompt=generate_prompt,
    required="",
    most_tokens=SGLANG_MOST_TOKENS,
    is_native=True,
)
PLACED = (CHAT, COMPLETIONS, GENERATE, EMBEDDINGS)
