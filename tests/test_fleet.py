"""The live fleet over fake runtimes: placing, losing workers, giving up."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from preble_sgl.core import ProgramId, Request, RequestRecord, SamplingParams, new_request_id, token_ids
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.errors import InputError, LaunchError, NoWorkerError, RequestRejected
from preble_sgl.fleet import Fleet
from tests.fakes import FakeRuntime
from tests.global_sched.stories import CPU_TINY

MakeFleet = Callable[..., Fleet]


def request(*prompt: int) -> Request:
    return Request(
        request_id=new_request_id(),
        program_id=ProgramId("p"),
        call_path="p/call0",
        prompt=token_ids(prompt),
        sampling=SamplingParams(max_new_tokens=2),
    )


@pytest.fixture
def two() -> tuple[FakeRuntime, FakeRuntime]:
    return FakeRuntime("a"), FakeRuntime("b")


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture
def fleet(two: tuple[FakeRuntime, FakeRuntime], records: list[RequestRecord], tiny_model: Path) -> Fleet:
    return Fleet(
        two,
        chat=ChatFormat.load(tiny_model),
        profile=CPU_TINY,
        policy="round_robin",
        on_record=records.append,
    )


async def test_a_request_is_placed_run_and_recorded(
    fleet: Fleet, two: tuple[FakeRuntime, FakeRuntime], records: list[RequestRecord]
) -> None:
    asked = request(1, 2, 3)
    completion = await fleet.generate(asked)
    assert completion.text == "ab"
    assert completion.output_ids == token_ids([7, 8])
    (record,) = records
    assert (record.request_id, record.worker_id, record.placement.reason) == (
        asked.request_id,
        "a",
        "round_robin",
    )
    assert record.submitted_at <= record.placed_at <= record.first_token_at <= record.finished_at
    fleet.scheduler.check_invariants()


async def test_calls_of_a_lost_runtime_run_on_another(
    fleet: Fleet, two: tuple[FakeRuntime, FakeRuntime], records: list[RequestRecord]
) -> None:
    a, b = two
    a.may_finish.clear()
    asked = [request(i, i, i) for i in range(1, 5)]
    answers = [asyncio.create_task(fleet.generate(one)) for one in asked]
    await a.streaming.wait()
    a.dead = True
    a.may_finish.set()
    assert [answer.text for answer in await asyncio.gather(*answers)] == ["ab"] * 4
    assert a.served == []
    assert len(b.served) == len(set(b.served)) == 4
    assert sorted(record.num_attempts for record in records) == [1, 1, 2, 2]
    fleet.scheduler.check_invariants()


async def test_without_a_runtime_left_every_call_fails_and_says_so(
    fleet: Fleet, two: tuple[FakeRuntime, FakeRuntime]
) -> None:
    for runtime in two:
        runtime.dead = True
    answers = await asyncio.gather(*(fleet.generate(request(i)) for i in range(1, 4)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [NoWorkerError] * 3
    with pytest.raises(NoWorkerError, match="every runtime of the fleet is lost"):
        await fleet.generate(request(9))
    fleet.scheduler.check_invariants()


async def test_giving_up_a_call_aborts_it_on_its_runtime(
    fleet: Fleet, two: tuple[FakeRuntime, FakeRuntime], records: list[RequestRecord]
) -> None:
    a, _ = two
    a.may_finish.clear()
    asked = request(1, 2)
    answer = asyncio.create_task(fleet.generate(asked))
    await a.streaming.wait()
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    await asyncio.sleep(0)
    assert a.aborted == [asked.request_id]
    assert records == []
    assert fleet.scheduler.snapshot().num_queued == 0
    fleet.scheduler.check_invariants()


async def test_followers_of_a_given_up_leader_go_on(
    fleet: Fleet, two: tuple[FakeRuntime, FakeRuntime]
) -> None:
    lonely = Fleet(two[:1], chat=fleet.chat, profile=CPU_TINY, policy="round_robin")
    two[0].may_finish.clear()
    shared = range(1, 100)
    leader = asyncio.create_task(lonely.generate(request(*shared, 1000)))
    follower = asyncio.create_task(lonely.generate(request(*shared, 2000)))
    await asyncio.sleep(0)
    leader.cancel()
    two[0].may_finish.set()
    assert (await follower).text == "ab"


async def test_a_refused_request_fails_alone(fleet: Fleet, two: tuple[FakeRuntime, FakeRuntime]) -> None:
    class Refusing(FakeRuntime):
        async def stream(self, request: Request):  # type: ignore[no-untyped-def]
            if len(request.prompt) > 2:
                raise RequestRejected("too long")
            async for chunk in super().stream(request):
                yield chunk

    picky = Fleet([Refusing("a")], chat=fleet.chat, profile=CPU_TINY, policy="least_load")
    with pytest.raises(RequestRejected, match="too long"):
        await picky.generate(request(1, 2, 3))
    assert (await picky.generate(request(1))).text == "ab"


async def test_a_stock_runtime_is_given_priorities_that_stand_for_the_order(fleet: Fleet) -> None:
    asked: list[Request] = []

    class Stock(FakeRuntime):
        async def stream(self, request: Request):  # type: ignore[no-untyped-def]
            asked.append(request)
            async for chunk in super().stream(request):
                yield chunk

    stock = Stock("a")
    stock.info = replace(stock.info, wire_order="preble_groups")
    alone = Fleet([stock], chat=fleet.chat, profile=CPU_TINY, policy="round_robin")
    await alone.generate(request(*range(1, 100)))
    await alone.generate(request(*range(1, 90), *range(200, 210)))
    assert [one.priority for one in asked] == [1, 8]


async def test_flushing_forgets_what_the_scheduler_believed(
    fleet: Fleet, two: tuple[FakeRuntime, FakeRuntime], records: list[RequestRecord]
) -> None:
    lonely = Fleet(two[:1], chat=fleet.chat, profile=CPU_TINY, on_record=records.append)
    await lonely.generate(request(*range(1, 50)))
    await lonely.generate(request(*range(1, 50)))
    await lonely.flush_cache()
    await lonely.generate(request(*range(1, 50)))
    assert two[0].flushes == 1
    assert records[1].placement.matched_len > 0
    assert records[2].placement.matched_len == 0


async def test_a_fleet_opened_in_async_code_refuses_the_sync_calls(fleet: Fleet) -> None:
    with pytest.raises(InputError, match="use arun, amap and aplan"):
        fleet.call(lambda: asyncio.sleep(0))


def test_bad_fleets_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 runtimes asked for: at least 1"):
        Fleet.launch(runtimes=0)
    with pytest.raises(InputError, match="no_such_policy"):
        Fleet.launch(policy="no_such_policy")
    with pytest.raises(InputError, match="give at least one URL"):
        Fleet.attach([])
    with pytest.raises((InputError, LaunchError), match="nowhere"), Fleet.launch(tmp_path / "nowhere"):
        pass
