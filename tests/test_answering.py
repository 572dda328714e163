"""Putting an answer together from several attempts: nothing streamed twice, nothing missing."""

from dataclasses import replace

import pytest

from preble_sgl.answering import Answering
from preble_sgl.core import (
    Chunk,
    ProgramId,
    Request,
    RequestId,
    SamplingParams,
    TokenIds,
    Usage,
    token_ids,
)


def decode(ids: TokenIds) -> str:
    """Every token is one byte of UTF-8."""
    return bytes(ids.tolist()).decode(errors="replace")


def ids(text: str) -> TokenIds:
    return token_ids(list(text.encode()))


def asked(**sampling: object) -> Request:
    return Request(
        request_id=RequestId("first"),
        program_id=ProgramId("p"),
        call_path="p/call0",
        prompt=ids("ask:"),
        sampling=replace(SamplingParams(max_new_tokens=10), **sampling),  # type: ignore[arg-type]
    )


class Heard:
    """What a listener was told: the text of each answer that was begun."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.ids: dict[int, TokenIds] = {}

    def __call__(self, chunk: Chunk, number: int) -> None:
        self.texts[number] = self.texts.get(number, "") + chunk.text
        self.ids[number] = self.ids.get(number, token_ids()) + chunk.output_ids


def begun(request: Request, *pieces: str) -> tuple[Answering, Heard]:
    """Return an answer whose first runtime was lost after these pieces."""
    heard = Heard()
    answering = Answering(request, decode, heard)
    answering.next_request()
    for piece in pieces:
        answering.take(Chunk(ids(piece), piece))
    return answering, heard


def test_the_next_runtime_gets_the_prompt_and_the_tokens_that_are_there() -> None:
    answering, _ = begun(asked(), "he", "l")
    request = answering.next_request()
    assert decode(request.prompt) == "ask:hel"
    assert request.sampling.max_new_tokens == 7
    assert request.request_id != "first"


def test_an_answer_that_goes_on_elsewhere_is_one_answer_with_the_usage_of_one() -> None:
    answering, heard = begun(asked(), "hel")
    answering.next_request()
    answering.take(Chunk(ids("lo"), "lo", "stop", Usage(7, 6, 2)))
    completion = answering.completion()
    assert (completion.text, completion.output_ids) == ("hello", ids("hello"))
    assert completion.usage == Usage(4, 4, 5)
    assert heard.texts == {0: "hello"}
    assert answering.num_attempts == 2


@pytest.mark.parametrize(
    "request_",
    [
        asked(regex="[a-z]+"),
        asked(json_schema="{}"),
        asked(frequency_penalty=0.1),
        asked(presence_penalty=0.1),
        asked(stop=("lx",)),
        asked(max_new_tokens=3),
        replace(asked(), num_top_logprobs=1),
        replace(asked(), images=("file.png",)),
    ],
    ids=[
        "regex",
        "schema",
        "frequency",
        "presence",
        "half a stop string",
        "no token left",
        "logprobs",
        "images",
    ],
)
def test_a_call_whose_state_is_more_than_its_tokens_is_repeated_and_not_streamed_twice(
    request_: Request,
) -> None:
    answering, heard = begun(request_, "he", "l")
    request = answering.next_request()
    assert decode(request.prompt) == "ask:"
    assert request.sampling == request_.sampling
    for piece in ("h", "el", "lo"):
        answering.take(Chunk(ids(piece), piece))
    answering.take(Chunk(token_ids(), "", "stop", Usage(4, 4, 5)))
    assert heard.texts == {0: "hello"}
    assert heard.ids == {0: ids("hello")}
    assert answering.completion().usage == Usage(4, 4, 5)


def test_a_stop_string_that_has_not_begun_does_not_keep_a_call_from_going_on() -> None:
    answering, _ = begun(asked(stop=("xl", "\n")), "hel")
    assert decode(answering.next_request().prompt) == "ask:hel"


def test_a_character_that_is_half_there_is_repeated_whole() -> None:
    answering, heard = begun(asked())
    answering.take(Chunk(ids("aé")[:2], "a"))  # the runtime holds half a character back
    assert decode(answering.next_request().prompt) == "ask:"
    answering.take(Chunk(ids("a"), "a"))
    answering.take(Chunk(ids("é"), "é", "length", Usage(4, 0, 3)))
    assert heard.texts == {0: "aé"}
    assert heard.ids == {0: ids("aé")}


@pytest.mark.parametrize("pieces", [("hi", "jack"), ("he", ""), ("h", "e", "y!")])
def test_an_answer_that_turns_out_differently_begins_anew_and_says_so(pieces: tuple[str, ...]) -> None:
    answering, heard = begun(asked(regex=".*"), "hel")
    answering.next_request()
    for piece in pieces[:-1]:
        answering.take(Chunk(ids(piece), piece))
    answering.take(Chunk(ids(pieces[-1]), pieces[-1], "stop"))
    assert heard.texts == {0: "hel", 1: "".join(pieces)}
    assert answering.completion().text == "".join(pieces)


def test_runtimes_may_be_lost_again_and_again() -> None:
    answering, heard = begun(asked(json_schema="{}"), "hel")
    for upto in (1, 2, 4):  # lost while it repeats, twice, and once beyond
        answering.next_request()
        for letter in "hello"[:upto]:
            answering.take(Chunk(ids(letter), letter))
    answering.next_request()
    answering.take(Chunk(ids("hello"), "hello", "stop"))
    assert heard.texts == {0: "hello"}
    assert answering.completion().output_ids == ids("hello")


def test_a_call_that_has_no_token_is_simply_asked_again_under_a_new_id() -> None:
    answering, _ = begun(asked())
    again = answering.next_request()
    assert again == replace(asked(), request_id=again.request_id)
    assert again.request_id != "first"
