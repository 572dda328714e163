"""Real runtimes that are killed, stopped, drained and taken away in the middle of a batch."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from preble_sgl.core import Completion, RequestRecord, WorkerId
from preble_sgl.errors import InputError, UnknownIdError
from preble_sgl.fleet import Fleet
from preble_sgl.runtime_ext.environment import missing_requirements
from preble_sgl.runtime_ext.supervisor import Watching
from tests.faults.batches import batch, check, kill, run_batch, server_of, wait_workers
from tests.server.serving import serving

pytestmark = [pytest.mark.sglang, pytest.mark.asyncio(loop_scope="module")]

WATCHING = Watching(poll_s=0.2, timeout_s=5.0, misses=3, backoff_s=0.1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tiny_model: Path) -> AsyncIterator[Fleet]:
    if missing := missing_requirements(gpu=False):
        pytest.skip(f"real SGLang cannot run here: {missing[0]}")
    async with Fleet.launch(tiny_model, runtimes=2, watching=WATCHING) as opened:
        yield opened


async def expected(fleet: Fleet, num_calls: int, output_len: int) -> list[Completion]:
    """Return the answers of a batch when nothing happens, on two runtimes that are up."""
    fleet.scheduler.check_invariants()
    answers = await run_batch(fleet, batch(num_calls, output_len))
    check(answers, [completion for completion, _ in answers])
    return [completion for completion, _ in answers]


async def test_killed_runtimes_cost_time_and_no_row_and_no_token(fleet: Fleet) -> None:
    rng = random.Random(0)
    await wait_workers(fleet, 2)
    wanted = await expected(fleet, 24, 120)
    for _ in range(3):
        running = asyncio.create_task(run_batch(fleet, batch(24, 120)))
        await asyncio.sleep(rng.uniform(0.1, 2.0))
        victim = rng.choice(fleet.worker_ids)
        await kill(fleet, victim)
        check(await running, wanted)
        await wait_workers(fleet, 2)


async def test_over_http_a_killed_runtime_is_replaced_unseen_before_the_first_byte_and_after_it(
    fleet: Fleet,
) -> None:
    body = {"messages": [{"role": "user", "content": "A long story"}], "temperature": 0, "ignore_eos": True}
    body["max_tokens"] = 200
    await wait_workers(fleet, 2)
    async with serving(fleet) as server:
        wanted: Any = (await server.post("/v1/chat/completions", body)).json
        asking = asyncio.create_task(server.post("/v1/chat/completions", body))
        while not (busy := [one for one in fleet.worker_ids if fleet.num_running(one)]):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await kill(fleet, *busy)
        reply = await asking
        answer: Any = reply.json
        assert answer["choices"] == wanted["choices"]
        assert reply.headers["x-preble-worker"] not in busy
        await wait_workers(fleet, 2)

        async def killed_in_the_middle(path: str, asked: dict[str, Any]) -> list[bytes]:
            await wait_workers(fleet, 2)
            async with (
                asyncio.timeout(60),
                server.session.post(server.url + path, json=asked | {"stream": True}) as response,
            ):
                begun = await response.content.readany()
                await kill(fleet, WorkerId(response.headers["x-preble-worker"]))
                return (begun + await response.content.read()).split(b"\n\n")[:-1]

        *events, done = await killed_in_the_middle("/v1/chat/completions", body)
        assert done == b"data: [DONE]"
        deltas = [orjson.loads(event[6:])["choices"][0]["delta"].get("content") for event in events]
        assert "".join(filter(None, deltas)) == wanted["choices"][0]["message"]["content"]

        sampling = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
        native: Any = {"text": "A tale", "sampling_params": sampling}
        whole: Any = (await server.post("/generate", native)).json
        *events, done = await killed_in_the_middle("/generate", native)
        told = [orjson.loads(event[6:]) for event in events]
        assert [one for event in told for one in event["output_ids"]] == whole["output_ids"]
        assert "".join(event["text"] for event in told) == whole["text"]
        assert told[-1]["meta_info"]["completion_tokens"] == 200
        assert told[-1]["meta_info"]["prompt_tokens"] == whole["meta_info"]["prompt_tokens"]

        *_, last = await killed_in_the_middle("/v1/chat/completions", body | {"temperature": 1})
        assert b'"code":"broken_off"' in last
    await wait_workers(fleet, 2)


async def test_a_runtime_that_was_killed_comes_back_with_an_empty_cache_and_is_learnt_again(
    fleet: Fleet,
) -> None:
    await wait_workers(fleet, 2)
    await run_batch(fleet, batch(12, 4))
    before = {w["worker_id"]: w["used_tokens"] for w in fleet.describe_workers()}
    other, victim = sorted(before, key=lambda worker_id: before[worker_id])
    assert before[victim] > 0
    await kill(fleet, victim)
    await wait_workers(fleet, 2)
    after = {w["worker_id"]: w["used_tokens"] for w in fleet.describe_workers()}
    assert after[victim] < before[victim]  # nothing of before; warm-ups may have begun
    assert after[other] >= before[other]
    feeds = fleet.scheduler.snapshot().cache_feeds
    while not feeds[victim].is_live:
        await asyncio.sleep(0.05)
        feeds = fleet.scheduler.snapshot().cache_feeds
    answers = await run_batch(fleet, batch(12, 4, seed=1))
    assert sum(completion.usage.cached_tokens for completion, _ in answers) > 0
    assert all(feed.is_live for feed in fleet.scheduler.snapshot().cache_feeds.values())


async def test_the_calls_of_a_runtime_that_hangs_move_and_it_is_replaced(fleet: Fleet) -> None:
    wanted = await expected(fleet, 16, 120)
    running = asyncio.create_task(run_batch(fleet, batch(16, 120)))
    await asyncio.sleep(0.5)
    victim = fleet.worker_ids[0]
    hung = server_of(fleet, victim)
    hung.suspend()
    check(await running, wanted)
    await wait_workers(fleet, 2)
    assert not hung.is_running()
    assert server_of(fleet, victim).pid != hung.pid


async def test_all_runtimes_down_means_waiting_and_not_failing(fleet: Fleet) -> None:
    wanted = await expected(fleet, 6, 40)
    running = asyncio.create_task(run_batch(fleet, batch(6, 40)))
    await asyncio.sleep(0.3)
    await kill(fleet, *fleet.worker_ids)
    check(await running, wanted)
    await wait_workers(fleet, 2)


async def test_a_scheduler_process_that_hangs_alone_is_noticed(tiny_model: Path) -> None:
    watching = Watching(poll_s=0.2, timeout_s=5.0, misses=3, backoff_s=0.1, stall_s=4.0)
    async with Fleet.launch(tiny_model, runtimes=1, watching=watching) as fleet:
        (worker_id,) = fleet.worker_ids
        wanted = await expected(fleet, 4, 20)
        server = server_of(fleet, worker_id)
        (scheduler,) = [p for p in server.children() if "scheduler" in " ".join(p.cmdline())]
        scheduler.suspend()
        check(await run_batch(fleet, batch(4, 20)), wanted)  # waits for the restart
        assert server_of(fleet, worker_id).pid != server.pid


async def test_a_drained_runtime_finishes_its_calls_gets_none_and_is_ended(tiny_model: Path) -> None:
    async with Fleet.launch(tiny_model, runtimes=2, watching=WATCHING) as fleet:
        records: list[RequestRecord] = []
        fleet.on_record(records.append)
        wanted = await expected(fleet, 16, 100)
        records.clear()
        leaving, staying = fleet.worker_ids
        server = server_of(fleet, leaving)
        running = asyncio.create_task(run_batch(fleet, batch(16, 100)))
        await asyncio.sleep(0.5)
        draining = asyncio.create_task(fleet.drain(leaving))
        await asyncio.sleep(0)
        later = asyncio.create_task(run_batch(fleet, batch(16, 100)))
        with pytest.raises(InputError, match=f"worker {leaving} drains already"):
            await fleet.drain(leaving)
        await draining
        assert fleet.worker_ids == (staying,)
        assert not server.is_running()
        check(await running, wanted)
        check(await later, wanted)
        assert {record.num_attempts for record in records} == {1}
        assert {record.worker_id for record in records[-16:]} == {staying}
        with pytest.raises(UnknownIdError, match=f"there is no worker {leaving}; there are: {staying}"):
            await fleet.drain(leaving)


async def test_with_a_notice_what_cannot_finish_goes_on_elsewhere(tiny_model: Path) -> None:
    async with Fleet.launch(tiny_model, runtimes=2, watching=WATCHING) as fleet:
        wanted = await expected(fleet, 12, 400)
        records: list[RequestRecord] = []
        fleet.on_record(records.append)
        leaving, staying = fleet.worker_ids
        running = asyncio.create_task(run_batch(fleet, batch(12, 400)))
        await asyncio.sleep(0.5)
        moved = fleet.num_running(leaving)
        assert moved > 0
        await fleet.drain(leaving, notice_s=1.0)
        assert fleet.worker_ids == (staying,)
        check(await running, wanted)
        assert {record.worker_id for record in records if record.num_attempts == 2} == {staying}
        assert sum(record.num_attempts == 2 for record in records) == moved
