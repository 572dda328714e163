"""Requests that are aborted or left by their client, and flushing while there are any."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import orjson
import pytest

from tests.runtime_ext.emulated.runtimes import NEVER_S, Emulated, config, running

SLOW_S = 0.002
LONG = {"max_new_tokens": 1500}


@pytest.fixture
async def stuck() -> AsyncIterator[Emulated]:
    """A runtime whose first iteration never ends."""
    async with running(config(NEVER_S)) as emulated:
        yield emulated


@pytest.fixture
async def slow() -> AsyncIterator[Emulated]:
    """A runtime that takes seconds for an answer of 1500 tokens."""
    async with running(config(SLOW_S)) as emulated:
        yield emulated


async def begin(emulated: Emulated, rid: str) -> "asyncio.Task[object]":
    """Ask for something, and return once it has reached the engine."""
    before = await num_requests(emulated)
    task = asyncio.create_task(emulated.generate(*range(10), rid=rid))
    await wait_requests(emulated, before + 1)
    return task


async def num_requests(emulated: Emulated) -> int:
    load = await emulated.load()
    num: int = load["num_running_reqs"] + load["num_waiting_reqs"]
    return num


async def wait_requests(emulated: Emulated, num: int) -> None:
    async with asyncio.timeout(10):
        while await num_requests(emulated) != num:
            await asyncio.sleep(0.01)


async def test_an_abort_takes_every_request_whose_id_begins_with_a_living_one(slow: Emulated) -> None:
    async def answer(rid: str) -> str:
        body = {"input_ids": [1, 2, 3], "rid": rid, "sampling_params": LONG}
        reason: str = (await slow.post("/generate", **body)).json["meta_info"]["finish_reason"]["type"]
        return reason

    async with asyncio.TaskGroup() as group:
        job, longer, other = (group.create_task(answer(rid)) for rid in ("job1", "job10", "job2"))
        await wait_requests(slow, 3)
        assert (await slow.post("/abort_request", rid="job")).status == 200  # nobody has this very id
        assert await num_requests(slow) == 3
        await slow.post("/abort_request", rid="job1")
        assert (await job, await longer) == ("abort", "abort")
        assert not other.done()
        await slow.post("/abort_request", abort_all=True)
        assert await other == "abort"


async def test_a_waiting_request_can_be_aborted(stuck: Emulated) -> None:
    first = await begin(stuck, "first")
    second = await begin(stuck, "second")
    await stuck.post("/abort_request", rid="second")
    answer = await second
    assert isinstance(answer, dict)
    meta = answer["meta_info"]
    assert (meta["finish_reason"]["type"], meta["completion_tokens"], answer["text"]) == ("abort", 0, "")
    first.cancel()


async def test_a_stream_that_is_aborted_ends_with_what_it_has(slow: Emulated) -> None:
    body = {"input_ids": [1, 2, 3], "rid": "me", "stream": True, "sampling_params": LONG}
    async with slow.session.post(f"{slow.url}/generate", json=body) as response:
        await response.content.readuntil(b"\n\n")
        await slow.post("/abort_request", rid="me")
        *events, done, _ = (await response.read()).split(b"\n\n")
    last = orjson.loads(events[-1].removeprefix(b"data: "))
    assert done == b"data: [DONE]"
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(last["output_ids"]) == last["meta_info"]["completion_tokens"] < 1500


async def test_the_id_of_an_aborted_request_can_be_used_again(slow: Emulated) -> None:
    body = {"input_ids": [1, 2, 3], "rid": "me", "sampling_params": LONG}
    first = asyncio.create_task(slow.post("/generate", **body))
    await wait_requests(slow, 1)
    await slow.post("/abort_request", rid="me")
    await first
    assert (await slow.generate(1, 2, 3, rid="me"))["meta_info"]["completion_tokens"] == 4


async def test_aborting_nothing_is_no_error(quick: Emulated) -> None:
    assert [
        (await quick.post("/abort_request", **body)).status for body in ({"rid": "x"}, {}, {"rid": ""})
    ] == [*(200, 200, 200)]
    assert (await quick.post("/abort_request", rid=5)).status == 400


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_aborts_its_request(slow: Emulated, path: str, stream: bool) -> None:
    body = {"text": "a", "prompt": "a", "stream": stream, "sampling_params": LONG, "max_tokens": 1500}
    async with aiohttp.ClientSession() as session:
        call = asyncio.create_task(session.post(slow.url + path, json=body))
        await wait_requests(slow, 1)
        call.cancel() if not call.done() else call.result().close()
        await asyncio.gather(call, return_exceptions=True)
    await wait_requests(slow, 0)
    assert (await slow.generate(1, 2, 3))["meta_info"]["completion_tokens"] == 4


async def test_flushing_forgets(quick: Emulated) -> None:
    await quick.generate(*range(50))
    for flush in (quick.get, quick.post):
        reply = await flush("/flush_cache")
        assert (reply.status, reply.body.startswith(b"Cache flushed.")) == (200, True)
        assert (await quick.generate(*range(50)))["meta_info"]["cached_tokens"] == 0


async def test_flushing_is_refused_while_there_are_requests(stuck: Emulated) -> None:
    task = await begin(stuck, "r")
    assert (await stuck.post("/flush_cache")).status == 400
    assert (await stuck.get("/flush_cache?timeout=0.05")).status == 400
    task.cancel()


async def test_flushing_can_wait_until_all_is_done(slow: Emulated) -> None:
    answer = asyncio.create_task(slow.generate(*range(10), max_new_tokens=100))
    await wait_requests(slow, 1)
    assert (await slow.post("/flush_cache?timeout=30")).status == 200
    assert (await answer)["meta_info"]["completion_tokens"] == 100
    assert (await slow.generate(*range(10)))["meta_info"]["cached_tokens"] == 0


@pytest.mark.parametrize("timeout", ["x", "-1", "nan"])
async def test_a_bad_timeout_is_a_400(quick: Emulated, timeout: str) -> None:
    reply = await quick.get(f"/flush_cache?timeout={timeout}")
    assert (reply.status, "must be seconds" in reply.json["error"]["message"]) == (400, True)
