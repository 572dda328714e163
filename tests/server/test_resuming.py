"""A stream cut anywhere and gone on with elsewhere is the stream that was not cut."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_sgl.core import TokenIds, new_request_id, token_ids
from preble_sgl.server.endpoints import CHAT, GENERATE, Endpoint
from preble_sgl.server.errors import BrokenOff
from preble_sgl.server.resuming import Resuming, Sent, can_go_on, resuming_of
from preble_sgl.server.tenants import Tenant
from preble_sgl.server.wanted import Wanted

PROMPT = [5, 6, 7]
DONE = b"data: [DONE]\n\n"
PIECES = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=8)
GREEDY: dict[str, Any] = {"messages": [], "stream": True, "temperature": 0}
NATIVE: dict[str, Any] = {"input_ids": PROMPT, "stream": True, "sampling_params": {"temperature": 1.0}}


def wanted(max_new_tokens: int = 100) -> Wanted:
    return Wanted(
        request_id=new_request_id(),
        path="x",
        prompt=token_ids(PROMPT).tobytes(),
        max_new_tokens=max_new_tokens,
        tenant=Tenant(),
        namespace="",
        clue=None,
        timeout_s=None,
    )


def event(content: Any) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def decode(ids: TokenIds) -> str:
    return "".join(f"<{one}>" for one in ids)


def chat_events(pieces: list[str], name: str = "first") -> list[bytes]:
    """What a runtime streams; the last event ends it."""

    def chunk(delta: Any, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return event({"id": name, "choices": [choice], "usage": None})

    opening = chunk({"role": "assistant", "content": ""})
    return [opening, *(chunk({"content": piece}) for piece in pieces), chunk({}, "stop"), DONE]


def native_events(prompt_len: int, ids: list[int], name: str, *, repeats: bool = True) -> list[bytes]:
    """What a runtime streams: each event repeats all, or tells what is new."""

    def so_far(num: int) -> bytes:
        meta = {
            "id": name,
            "prompt_tokens": prompt_len,
            "completion_tokens": num,
            "cached_tokens": 0,
            "finish_reason": {"type": "length"} if num == len(ids) else None,
        }
        told = ids[0 if repeats else num - 1 : num]
        return event({"text": decode(token_ids(told)), "output_ids": told, "meta_info": meta})

    return [*map(so_far, range(1, len(ids) + 1)), DONE]


def resumed(
    endpoint: Endpoint,
    body: dict[str, Any],
    sent_events: list[bytes],
    *,
    repeats: bool = True,
    next_repeats: bool = True,
) -> Resuming | None:
    sent = Sent(keeps_all=can_go_on(endpoint, body))
    sent.tells_new_only = not repeats
    for one in sent_events:
        sent.add(one)
    return resuming_of(endpoint, wanted(), body, sent, decode, not next_repeats)


def contents(events: list[bytes]) -> str:
    deltas = [orjson.loads(one[6:])["choices"][0]["delta"] for one in events if one != DONE]
    return "".join(delta.get("content") or "" for delta in deltas)


@given(first=PIECES, split=st.data())
def test_a_greedy_stream_is_said_again_but_not_sent_again(first: list[str], split: st.DataObject) -> None:
    text = "".join(first)
    sent = chat_events(first)[: split.draw(st.integers(1, len(first) + 1))]
    cuts = sorted(split.draw(st.sets(st.integers(1, max(1, len(text) - 1)))) - {len(text)})
    again = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    resuming = resumed(CHAT, GREEDY, sent)
    assert resuming is not None
    rest = [resuming.feed(one) for one in chat_events(again, "second")]
    got = [*sent, *(part + b"\n\n" for one in rest for part in one.split(b"\n\n")[:-1])]
    assert contents(got) == text
    assert got[-1] == DONE
    assert {orjson.loads(one[6:])["id"] for one in got if one != DONE} == {"first"}


def test_another_answer_is_not_glued_to_the_first() -> None:
    resuming = resumed(CHAT, GREEDY, chat_events(["hello"])[:2])
    assert resuming is not None
    with pytest.raises(BrokenOff, match="answers differently"):
        resuming.feed(b"".join(chat_events(["help"])))
    shorter = resumed(CHAT, GREEDY, chat_events(["hello"])[:2])
    assert shorter is not None
    with pytest.raises(BrokenOff, match="answers differently"):
        shorter.feed(b"".join(chat_events(["he"])))


@given(ids=st.lists(st.integers(0, 9), min_size=2, max_size=9), split=st.data())
@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("next_repeats", [True, False])
def test_token_ids_are_gone_on_with(
    ids: list[int], split: st.DataObject, repeats: bool, next_repeats: bool
) -> None:
    uncut = native_events(len(PROMPT), ids, "first", repeats=repeats)
    num_sent = split.draw(st.integers(1, len(ids) - 1))
    resuming = resumed(GENERATE, NATIVE, uncut[:num_sent], repeats=repeats, next_repeats=next_repeats)
    assert resuming is not None
    prompt = [*PROMPT, *ids[:num_sent]]
    assert resuming.fields["input_ids"] == prompt
    assert resuming.fields["sampling_params"] == {"temperature": 1.0, "max_new_tokens": 100 - num_sent}
    again = native_events(len(prompt), ids[num_sent:], "second", repeats=next_repeats)
    rest = [resuming.feed(one) for one in again]
    assert [*uncut[:num_sent], *rest] == uncut


@pytest.mark.parametrize(
    "more",
    [
        {"return_logprob": True},
        {"sampling_params": {"regex": "a"}},
        {"sampling_params": {"n": 2}},
        {"sampling_params": {"frequency_penalty": 1.0}},
        {"input_ids": [[1], [2]]},
    ],
)
def test_what_is_more_than_its_tokens_is_not_gone_on_with(more: dict[str, Any]) -> None:
    assert resumed(GENERATE, NATIVE | more, native_events(3, [1, 2], "first")[:1]) is None


@pytest.mark.parametrize("more", [{"temperature": 0.5}, {"n": 2}, {"tools": []}, {"logprobs": True}])
def test_what_another_runtime_may_say_differently_is_not_said_again(more: dict[str, Any]) -> None:
    assert resumed(CHAT, GREEDY | more, chat_events(["a"])[:2]) is None


def test_half_a_character_is_not_gone_on_with() -> None:
    half = native_events(3, [1, 2], "first")[0].replace(b'"text":"<1>"', b'"text":"<"')
    assert resumed(GENERATE, NATIVE, [half]) is None
