"""Whatever the cuts, a client gets the stream that the runtime sent, less the usage it did not ask for."""

from collections.abc import Iterable
from itertools import pairwise

import orjson
from hypothesis import given
from hypothesis import strategies as st

from preble_sgl.core import Usage
from preble_sgl.server.sse_tail import SseTail

TEXTS = st.text(max_size=20) | st.sampled_from(['"choices":[]', '\n\ndata: {"choices":[]}\n\n', "[DONE]"])
USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
}


def event(content: object) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def chunk(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}], "usage": None})


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    ends = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(ends)]


@given(texts=st.lists(TEXTS), places=st.lists(st.integers(0, 10_000)), keep=st.booleans())
def test_cuts_anywhere_change_nothing(texts: list[str], places: list[int], keep: bool) -> None:
    chunks, done = b"".join(map(chunk, texts)), b"data: [DONE]\n\n"
    tail = SseTail(keep=keep)
    got = b"".join(map(tail.feed, cut(chunks + event(USAGE) + done, places))) + tail.close()
    assert got == chunks + (event(USAGE) if keep else b"") + done
    assert tail.usage == Usage(9, 4, 3)


@given(data=st.binary(max_size=300), places=st.lists(st.integers(0, 10_000)))
def test_bytes_that_are_no_events_go_through_as_they_are(data: bytes, places: list[int]) -> None:
    tail = SseTail(keep=False)
    assert b"".join(map(tail.feed, cut(data, places))) + tail.close() == data


def test_nothing_is_held_back_but_half_an_event() -> None:
    tail = SseTail(keep=False)
    first, second = chunk("a"), chunk("b")
    assert tail.feed(first + second[:10]) == first
    assert tail.feed(second[10:]) == second


def test_an_event_without_choices_and_without_usage_goes_through() -> None:
    tail = SseTail(keep=False)
    assert tail.feed(event({"choices": []})) == event({"choices": []})
    broken = b'data: {"choices":[] \n\n'
    assert tail.feed(broken) == broken
    assert tail.usage is None


def test_usage_never_says_more_cached_than_there_is() -> None:
    tail = SseTail(keep=True)
    tail.feed(event({"choices": [], "usage": {"prompt_tokens": 2, "prompt_tokens_details": None}}))
    assert tail.usage == Usage(2, 0, 0)
