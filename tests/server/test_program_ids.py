"""Which program a request belongs to."""

from typing import Any

import pytest

from preble_sgl.server.programs import ProgramIds, clue_of

SYSTEM, HELLO = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}
ANSWER, MORE = {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "More"}


def of(ids: ProgramIds, *messages: Any, tenant: str = "a", **body: Any) -> str:
    return ids.of(tenant, clue_of(tenant, {}, {"messages": list(messages), **body}))


def test_a_conversation_that_grows_is_one_program() -> None:
    ids = ProgramIds()
    first = of(ids, SYSTEM, HELLO)
    assert of(ids, SYSTEM, HELLO, ANSWER, MORE) == first
    assert of(ids, SYSTEM, HELLO, ANSWER, MORE, ANSWER, HELLO) == first


def test_conversations_that_share_only_a_system_prompt_are_two() -> None:
    ids = ProgramIds()
    assert of(ids, SYSTEM, HELLO) != of(ids, SYSTEM, MORE)


def test_tenants_never_meet() -> None:
    ids = ProgramIds()
    assert of(ids, HELLO) != of(ids, HELLO, tenant="b")
    assert of(ids, HELLO, user="u") != of(ids, HELLO, user="u", tenant="b")


@pytest.mark.parametrize("name", ["prompt_cache_key", "session_id", "previous_response_id", "user"])
def test_ids_that_clients_send_anyway_count(name: str) -> None:
    ids = ProgramIds()
    assert of(ids, HELLO, **{name: "x"}) == of(ids, MORE, **{name: "x"}) == "a/x"


def test_our_header_goes_before_all_else() -> None:
    headers = {b"x-preble-program": b"mine", b"x-session-id": b"s"}
    assert ProgramIds().of("a", clue_of("a", headers, {"user": "u"})) == "a/mine"
    assert ProgramIds().of("a", clue_of("a", {b"x-session-id": b"s"}, {"user": "u"})) == "a/s"


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": "x"}, {"user": 3}, {"prompt": "x"}])
def test_without_anything_to_go_by_each_request_is_its_own(body: dict[str, Any]) -> None:
    ids = ProgramIds()
    assert clue_of("a", {}, body) is None
    assert ids.of("a", None) != ids.of("a", None)


def test_old_conversations_are_forgotten() -> None:
    ids = ProgramIds(most=1)
    first = of(ids, HELLO)
    of(ids, MORE)
    assert of(ids, HELLO, ANSWER) != first
