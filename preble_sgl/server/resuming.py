"""Go on with a stream whose runtime was lost in the middle, on another runtime.

- `/generate` tells token ids: the next runtime gets the prompt and those, and goes on behind them.
- A greedy OpenAI stream tells only text: the next runtime says all of it again, which is compared with what
  was sent and not sent twice.

Requests whose state is more than that (a grammar under way, penalties, tools, several answers, log-
probabilities) are not gone on with, and neither is an answer that turns out to be another one: the stream
ends with an error.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from preble_sgl.core import TokenIds, token_ids
from preble_sgl.server.endpoints import Endpoint
from preble_sgl.server.errors import BrokenOff
from preble_sgl.server.wanted import Wanted

END = b"\n\n"
DATA = b"data: {"
IDS = {"user", "prompt_cache_key", "session_id", "routing_key", "rid", "priority", "cache_salt", "extra_key"}
LENGTHS = {"max_tokens", "max_completion_tokens", "max_new_tokens", "ignore_eos", "stop_token_ids"}
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed", "sampling_seed", "n"}
GREEDY = IDS | LENGTHS | SAMPLING | {"model", "messages", "prompt", "stream", "stream_options", "stop"}
NATIVE = IDS | {"text", "input_ids", "sampling_params", "stream", "kv_hints"}
NATIVE_PARAMS = LENGTHS | SAMPLING
TEXTS = ("text", "content", "reasoning_content")


class Sent:
    """What the client has of a stream. `keeps_all`: whether more than its end may be needed.

    `tells_new_only`: of the runtime that began it, see `RuntimeInfo`.
    """

    def __init__(self, *, keeps_all: bool) -> None:
        self._keeps_all = keeps_all
        self._parts: list[bytes] = []
        self.num_parts = 0
        self.tells_new_only = False

    def add(self, data: bytes) -> None:
        """Take note of whole events."""
        self.num_parts += 1
        if not self._keeps_all and DATA in data:
            self._parts.clear()
        self._parts.append(data)

    def events(self) -> list[Any]:
        """Return what was kept, parsed."""
        return _parsed(b"".join(self._parts))

    def last_event(self) -> Any:
        """Return the last event, parsed; None without any."""
        parts = (part for part in reversed(self._parts) if DATA in part)
        return next((_parsed(part)[-1] for part in parts), None)


class Resuming(Protocol):
    """The rest of one answer. `fields`: what to set in the request for it."""

    @property
    def fields(self) -> Mapping[str, Any]: ...

    def feed(self, data: bytes) -> bytes:
        """Take whole events of the next runtime; return what the client gets. Raises BrokenOff."""
        ...


def can_go_on(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Return whether another runtime may be able to say the rest of a stream."""
    return can_replay(endpoint, body) or can_continue(endpoint, body)


def can_replay(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Return whether a runtime that is asked again says the same."""
    is_greedy = body.get("temperature") == 0 and body.get("n") in (None, 1)
    return not endpoint.is_native and is_greedy and body.keys() <= GREEDY


def resuming_of(
    endpoint: Endpoint,
    wanted: Wanted,
    body: Mapping[str, Any],
    sent: Sent,
    decode: Callable[[TokenIds], str],
    tells_new_only: bool,
) -> Resuming | None:
    """Return how to go on behind what was sent, with what such a runtime tells; None if nobody can."""
    events = sent.events()
    if can_replay(endpoint, body):
        return _Replay(events)
    if not can_continue(endpoint, body) or not all("output_ids" in event for event in events):
        return None
    told = events if sent.tells_new_only else events[-1:]
    said = _Said([one for event in told for one in event["output_ids"]], "".join(one["text"] for one in told))
    if len(said.ids) >= wanted.max_new_tokens or decode(token_ids(said.ids)) != said.text:
        return None
    name = events[-1]["meta_info"]["id"]
    return _Continuation(wanted, body, said, name, from_new=tells_new_only, to_new=sent.tells_new_only)


@dataclass(slots=True)
class _Said:
    """What a native stream has told."""

    ids: list[int]
    text: str


def can_continue(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Return whether a runtime can go on behind the tokens that another told."""
    params = body.get("sampling_params") or {}
    given = {name for name, value in body.items() if value is not None}
    is_one = isinstance(params, dict) and params.get("n") in (None, 1) and _is_one_prompt(body)
    return endpoint.is_native and is_one and given <= NATIVE and params.keys() <= NATIVE_PARAMS


def _is_one_prompt(body: Mapping[str, Any]) -> bool:
    ids = body.get("input_ids")
    return isinstance(body.get("text"), str) if ids is None else bool(ids) and isinstance(ids[0], int)


class _Continuation:
    """Behind the tokens that were told. `from_new`, `to_new`: whether events have what is new only."""

    def __init__(
        self, wanted: Wanted, body: Mapping[str, Any], said: _Said, name: str, *, from_new: bool, to_new: bool
    ) -> None:
        self._said = said
        self._num_given, self._num_given_chars = len(said.ids), len(said.text)
        self._name = name
        self._from_new, self._to_new = from_new, to_new
        params = dict(body.get("sampling_params") or {})
        params["max_new_tokens"] = wanted.max_new_tokens - len(said.ids)
        self.fields = {"input_ids": [*wanted.token_ids, *said.ids], "text": None, "sampling_params": params}

    def feed(self, data: bytes) -> bytes:
        return b"".join(map(self._told_of_whole, _events(data)))

    def _told_of_whole(self, event: bytes) -> bytes:
        if not event.startswith(DATA):
            return event + END
        content, said = orjson.loads(event[6:]), self._said
        if "meta_info" in content:
            ids, text = self._new(content)
            said.ids += ids
            said.text += text
            content["output_ids"] = ids if self._to_new else said.ids
            content["text"] = text if self._to_new else said.text
            meta = content["meta_info"]
            meta["id"] = self._name
            meta["prompt_tokens"] -= self._num_given
            meta["completion_tokens"] += self._num_given
        return _event(content)

    def _new(self, content: Mapping[str, Any]) -> tuple[list[int], str]:
        ids, text = content["output_ids"], content["text"]
        if self._from_new:
            return ids, text
        num_chars = len(self._said.text) - self._num_given_chars
        return ids[len(self._said.ids) - self._num_given :], text[num_chars:]


class _Replay:
    """Through what was sent, again, and then on."""

    fields: Mapping[str, Any] = {}

    def __init__(self, sent: Iterable[Any]) -> None:
        self._known = dict.fromkeys(TEXTS, "")
        self._said = dict.fromkeys(TEXTS, "")
        self._id: str | None = None
        for content in sent:
            self._id = self._id or content.get("id")
            for _, name, text in _texts(content):
                self._known[name] += text

    def feed(self, data: bytes) -> bytes:
        return b"".join(self._new(event) for event in _events(data))

    def _new(self, event: bytes) -> bytes:
        if not event.startswith(DATA):
            return event + END
        content, is_behind = orjson.loads(event[6:]), self._said == self._known
        num_new = sum(self._cut(*one) for one in list(_texts(content)))
        choices = content.get("choices")
        ends = not choices or any(choice.get("finish_reason") for choice in choices)
        if ends and self._said != self._known:
            raise BrokenOff("the runtime was lost, and another one answers differently")
        if self._id:
            content["id"] = self._id
        return _event(content) if num_new or ends or is_behind else b""

    def _cut(self, holder: dict[str, Any], name: str, text: str) -> int:
        """Leave only what is new of a text in its place; return how long that is."""
        begin, known = len(self._said[name]), self._known[name]
        again = known[begin : begin + len(text)]
        if not text.startswith(again):
            raise BrokenOff("the runtime was lost, and another one answers differently")
        holder[name] = text[len(again) :]
        self._said[name] += text
        self._known[name] = known if len(known) > len(self._said[name]) else self._said[name]
        return len(holder[name])


def _texts(content: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield what holds a text of an event, under which name, and the text."""
    for choice in content.get("choices") or ():
        holder = choice.get("delta", choice)
        for name in TEXTS:
            if isinstance(holder.get(name), str):
                yield holder, name, holder[name]


def _parsed(data: bytes) -> list[Any]:
    return [orjson.loads(event[6:]) for event in _events(data) if event.startswith(DATA)]


def _events(data: bytes) -> list[bytes]:
    return data.split(END)[:-1]


def _event(content: Any) -> bytes:
    return b"data: " + orjson.dumps(content) + END
