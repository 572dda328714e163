"""The token ids of what clients ask, as the runtime will see them, for placement.

The body itself goes to the runtime as it was sent, so a difference here costs reuse, never an answer. Chats
are prepared for the template as SGLang 0.5.23 does it (`serving_chat.py: _apply_jinja_template`).
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import orjson

from preble_sgl.core import TokenIds, token_ids
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.errors import InputError

LONG = 20_000
"""Characters beyond which a text is tokenised in a thread, so that the others need not wait for it."""

_NOTHING = token_ids([0])
"""Stands for a prompt of which nothing can be known, such as one of embeddings."""


class Prompts:
    """Reads the prompts out of bodies."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat

    def decode(self, ids: TokenIds) -> str:
        """Return the text of tokens, special ones left out."""
        return self._chat.decode(ids)

    async def chat(self, body: Mapping[str, Any]) -> TokenIds:
        """Return the prompt of a chat completion. Raises InputError for messages that are none."""
        text = self._rendered(body)
        if not text:
            raise InputError("the chat template makes nothing of these messages")
        if self._chat.segments.unknown_len(text) > LONG:
            return await asyncio.to_thread(self._chat.encode_in_parts, text)
        return self._chat.encode_in_parts(text)

    async def text(self, prompt: Any) -> TokenIds:
        """Return a prompt that is a text, token ids, or several of either: then the first one."""
        if isinstance(prompt, str) and prompt:
            encode = self._chat.encode_start
            return await asyncio.to_thread(encode, prompt) if len(prompt) > LONG else encode(prompt)
        if isinstance(prompt, list) and prompt:
            return _ids(prompt) if isinstance(prompt[0], int) else await self.text(prompt[0])
        raise InputError("the prompt is empty: give a text or token ids")

    def _rendered(self, body: Mapping[str, Any]) -> str:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise InputError("messages: give a list with at least one message")
        shown = [_shown(message) for message in messages]
        is_open = not body.get("continue_final_message")
        try:
            return self._chat.render(shown, open_answer=is_open, **dict(_template_arguments(body)))
        except InputError:
            raise
        except Exception as error:  # a template is a program of the model's, and the runtime will judge
            raise InputError(f"the chat template does not take these messages: {error}") from error


def _ids(prompt: Sequence[Any]) -> TokenIds:
    try:
        return token_ids(prompt)
    except (TypeError, OverflowError):
        raise InputError("the prompt is neither a text nor a list of token ids") from None


def _shown(message: Any) -> dict[str, Any]:
    """Return a message as templates take it: its content a text, arguments of tool calls as objects."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError("messages: each needs a role")
    shown = {name: value for name, value in message.items() if value is not None}
    shown["content"] = _text(message.get("content"))
    if message.get("tool_calls"):
        shown["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return shown


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InputError("messages: the content is neither a text nor a list of parts")
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return " ".join(str(part.get("text", "")) for part in parts)


def _tool_call(call: Any) -> Any:
    arguments = call.get("function", {}).get("arguments") if isinstance(call, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        parsed = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return call
    return {**call, "function": {**call["function"], "arguments": parsed}}


def _template_arguments(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    tools = body.get("tools")
    if isinstance(tools, list) and tools and body.get("tool_choice") != "none":
        yield "tools", [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools]
    if body.get("reasoning_effort") is not None:
        yield "reasoning_effort", body["reasoning_effort"]
    extra = body.get("chat_template_kwargs")
    if isinstance(extra, dict):
        yield from extra.items()


Reader = Callable[[Prompts, Mapping[str, Any]], Any]


async def chat_prompt(prompts: Prompts, body: Mapping[str, Any]) -> TokenIds:
    """Read `/v1/chat/completions`."""
    return await prompts.chat(body)


async def completion_prompt(prompts: Prompts, body: Mapping[str, Any]) -> TokenIds:
    """Read `/v1/completions`."""
    return await prompts.text(body.get("prompt"))


async def generate_prompt(prompts: Prompts, body: Mapping[str, Any]) -> TokenIds:
    """Read `/generate`."""
    ids = body.get("input_ids")
    return await prompts.text(body.get("text") if ids is None else ids)


async def embedding_prompt(prompts: Prompts, body: Mapping[str, Any]) -> TokenIds:
    """Read `/v1/embeddings`, which may hold what is no text."""
    try:
        return await prompts.text(body.get("input"))
    except InputError:
        return _NOTHING
