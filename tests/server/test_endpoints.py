"""What of a body reaches a runtime."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_sgl.attempts import Attempt
from preble_sgl.core import Placement, ProgramId, Request, WorkerId, new_request_id, token_ids
from preble_sgl.runtime_ext.plugin.hints import CallHint, Hint, envelope
from preble_sgl.server.endpoints import CHAT, GENERATE, with_fields
from preble_sgl.server.relay import Ask
from preble_sgl.server.tenants import Tenant
from preble_sgl.server.wanted import Wanted
from tests.fakes import FakeRuntime

VALUES = st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), st.lists)
OBJECTS = st.dictionaries(st.text(), VALUES)


def ask(body: dict[str, Any], fields: dict[str, Any] | None = None) -> Ask:
    wanted = Wanted(
        request_id=new_request_id(),
        path="x",
        prompt=token_ids([1]).tobytes(),
        max_new_tokens=1,
        tenant=Tenant(),
        namespace="",
        clue=None,
        timeout_s=None,
    )
    endpoint = CHAT if "messages" in body else GENERATE
    raw = orjson.dumps(body)
    return Ask(endpoint=endpoint, wanted=wanted, raw=raw, body=body, fields=fields or {})


class WithPlugin(FakeRuntime):
    def hints_for(self, request: Request) -> list[Hint]:
        return [CallHint(request.program_id)]


def attempt(priority: int | None = None, runtime: FakeRuntime | None = None) -> Attempt:
    placement = Placement(new_request_id(), WorkerId("a"), 0, "explore")
    request = ask({}).wanted.request(ProgramId("p"), None)
    return Attempt(runtime or FakeRuntime("a"), placement, request, priority, 0.0, lambda: None, lambda: None)


@given(body=OBJECTS, fields=OBJECTS, blanks=st.sampled_from(["", " ", "\n\t "]))
def test_fields_are_set_and_nothing_else_changes(
    body: dict[str, Any], fields: dict[str, Any], blanks: str
) -> None:
    raw = blanks.encode() + orjson.dumps(body, option=orjson.OPT_INDENT_2)
    assert orjson.loads(with_fields(raw, body, fields)) == {**body, **fields}


def test_a_body_without_anything_to_add_stays_byte_for_byte() -> None:
    one = ask({"text": "x", "stream": True})
    assert one.sent(attempt(), {}) is one.raw
    whole = ask({"messages": []})
    assert whole.sent(attempt(), {}) is whole.raw


@pytest.mark.parametrize("given_options", [None, {}, {"include_usage": False, "x": 1}])
def test_streams_are_asked_for_their_usage(given_options: dict[str, Any] | None) -> None:
    body = {"messages": [], "stream": True} | (
        {} if given_options is None else {"stream_options": given_options}
    )
    sent = orjson.loads(ask(body).sent(attempt(), {}))
    assert sent == body | {"stream_options": {**(given_options or {}), "include_usage": True}}


def test_the_wait_queue_of_a_runtime_is_told_what_it_goes_by() -> None:
    body = {"text": "x", "priority": 9}
    assert orjson.loads(ask(body).sent(attempt(priority=3), {}))["priority"] == 3
    one = attempt(runtime=WithPlugin("a"))
    hints = envelope(one.request.request_id, [CallHint("p")])
    assert orjson.loads(ask(body).sent(one, {}))["kv_hints"] == hints
