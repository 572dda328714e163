"""The client against servers that misbehave, or are set up otherwise than ours."""

import socket
from contextlib import AsyncExitStack

import orjson
import pytest

from preble_sgl.core import Chunk, ProgramId, Request, RequestId, SamplingParams, Usage, token_ids
from preble_sgl.errors import InputError, RequestRejected, RuntimeLost
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.protocol import Runtime
from tests.runtime_ext.requests import request, run
from tests.runtime_ext.scripted_server import SETTINGS, ScriptedServer, event, serving

LENGTH = {"type": "length", "length": 2}
DONE = b"data: [DONE]\n\n"


async def answer_of(server: ScriptedServer, wanted: Request | None = None) -> list[Chunk]:
    async with serving(server) as url, SglangRuntime.attach(url) as attached:
        runtime: Runtime = attached  # mypy checks here that the client keeps the protocol
        return [chunk async for chunk in runtime.stream(wanted or request([1, 2, 3]))]


async def test_a_server_that_repeats_everything_is_reduced_to_what_is_new() -> None:
    server = ScriptedServer(
        [event([7], "se"), event([7, 8], "seven"), event([7, 8, 9], "seven", LENGTH), DONE]
    )
    chunks = await answer_of(server)
    assert [(chunk.output_ids.tolist(), chunk.text) for chunk in chunks] == [
        ([7], "se"),
        ([8], "ven"),
        ([9], ""),
    ]
    assert chunks[-1].usage == Usage(3, 2, 3)


async def test_a_server_that_sends_what_is_new_is_passed_on() -> None:
    pieces = [event([7], "se"), event([8], "ven", LENGTH), DONE]
    chunks = await answer_of(
        ScriptedServer(pieces, settings={**SETTINGS, "incremental_streaming_output": True})
    )
    assert [(chunk.output_ids.tolist(), chunk.text) for chunk in chunks] == [([7], "se"), ([8], "ven")]


async def test_events_may_be_cut_anywhere() -> None:
    stream = event([7], "a") + event([7, 8], "ab", LENGTH) + DONE
    chunks = await answer_of(ScriptedServer([stream[index : index + 1] for index in range(len(stream))]))
    assert [chunk.text for chunk in chunks] == ["a", "b"]


async def test_everything_asked_for_is_sent() -> None:
    server = ScriptedServer(
        [event([7], "a", LENGTH, input_token_logprobs=[[None, 2, None], [-1.5, 3, None]])]
    )
    sampling = SamplingParams(max_new_tokens=5, temperature=0.5, top_p=0.9, stop=("\n",), regex="a+", seed=1)
    wanted = Request(
        request_id=RequestId("r"),
        program_id=ProgramId("p"),
        call_path="p/gen",
        prompt=token_ids([1, 2, 3]),
        sampling=sampling,
        score_from=2,
        namespace="tenant",
        priority=4,
    )
    (chunk,) = await answer_of(server, wanted)
    assert chunk.logprobs == (-1.5,)
    (body,) = server.bodies
    params = body.pop("sampling_params")
    assert body == {
        "input_ids": [1, 2, 3],
        "rid": "r",
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": 1,
        "cache_salt": "tenant",
    }
    assert (
        params.items() >= {"max_new_tokens": 5, "temperature": 0.5, "regex": "a+", "sampling_seed": 1}.items()
    )
    assert (params["stop"], "json_schema" in params, "top_k" in params) == (["\n"], False, False)


async def test_priority_is_sent_to_a_server_that_schedules_by_it() -> None:
    server = ScriptedServer(
        [event([7], "a", LENGTH)], settings={**SETTINGS, "enable_priority_scheduling": True}
    )
    await answer_of(server)
    assert server.bodies[0]["priority"] == 0


@pytest.mark.parametrize(
    ("status", "piece"),
    [
        (400, orjson.dumps({"error": {"message": "too long"}})),
        (400, orjson.dumps({"error": "too long"})),
        (400, orjson.dumps({"object": "error", "message": "too long"})),
        (500, b"too long"),
        (503, orjson.dumps({"object": "error", "message": "too long"})),
        (200, b'data: {"error": {"message": "too\\n long", "code": 503}}\n\n'),
        (200, event([1], "x", {"type": "abort", "message": "too long", "status_code": 400})),
    ],
)
async def test_every_kind_of_refusal_is_a_rejection(status: int, piece: bytes) -> None:
    server = ScriptedServer([piece], status=status)
    with pytest.raises(RequestRejected, match=r"^call program/gen: too long$"):
        await answer_of(server)
    assert server.aborted == []


@pytest.mark.parametrize(
    ("status", "pieces"), [(200, []), (200, [event([7], "a")]), (502, [b""]), (504, [b""])]
)
async def test_half_an_answer_or_none_is_a_loss(status: int, pieces: list[bytes]) -> None:
    server = ScriptedServer(pieces, status=status)
    with pytest.raises(RuntimeLost, match=r"runtime 127\.0\.0\.1:[0-9]+ at http://"):
        await answer_of(server)
    assert server.aborted == []


async def test_an_abort_by_somebody_else_is_an_ordinary_end() -> None:
    chunks = await answer_of(ScriptedServer([event([7], "a", {"type": "abort", "message": "Abort"})]))
    assert chunks[-1].finish_reason == "abort"


async def test_only_an_unfinished_answer_is_aborted_when_closed() -> None:
    server = ScriptedServer([event([7], "a"), event([7, 8], "ab", LENGTH), DONE])
    async with serving(server) as url, SglangRuntime.attach(url) as runtime:
        wanted = request([1])
        answer = runtime.stream(wanted)
        await anext(answer)
        await answer.aclose()
        finished = runtime.stream(request([1]))
        await anext(finished)
        await anext(finished)
        await finished.aclose()
    assert server.aborted == [wanted.request_id]


async def test_a_server_that_is_gone_is_a_loss_and_not_ready() -> None:
    async with AsyncExitStack() as stack:
        async with serving(ScriptedServer()) as url:
            runtime = await stack.enter_async_context(SglangRuntime.attach(url))
        assert not await runtime.ready()
        with pytest.raises(RuntimeLost):
            await run(runtime, request([1]))
        with pytest.raises(RuntimeLost):
            await runtime.loads()


async def test_a_server_that_drains_is_not_ready() -> None:
    async with serving(ScriptedServer(ready=False)) as url, SglangRuntime.attach(url) as runtime:
        assert not await runtime.ready()


async def test_attaching_where_nothing_answers_is_a_loss() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(RuntimeLost, match="no runtime answers at http://"):
            async with SglangRuntime.attach(f"http://127.0.0.1:{bound.getsockname()[1]}"):
                pass


async def test_attaching_to_something_else_is_refused() -> None:
    async with serving(ScriptedServer(settings={"name": "another service"})) as url:
        with pytest.raises(InputError, match="answers, but is not an SGLang server"):
            async with SglangRuntime.attach(url):
                pass


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://host", "http://"])
async def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="is not the URL of a runtime"):
        async with SglangRuntime.attach(url):
            pass
