"""The driver: the engine keeps its own time, whatever this process is doing."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from preble_sgl.core import (
    CacheCleared,
    CacheEvent,
    ProgramId,
    Request,
    SamplingParams,
    new_request_id,
    token_ids,
)
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig, KvEventsConfig
from preble_sgl.runtime_ext.emulated.driver import Answer, Driver
from preble_sgl.runtime_ext.emulated.text import PseudoCodec, script_for
from preble_sgl.sim.engine import Engine
from preble_sgl.sim.jobs import Finished
from tests.runtime_ext.emulated.runtimes import config, engine_config, running

STEP_S = 0.001
WORDS = PseudoCodec().words


@asynccontextmanager
async def driven(overhead_s: float = 0.0, events: list[CacheEvent] | None = None) -> AsyncIterator[Driver]:
    def remember(batch: Sequence[CacheEvent]) -> None:
        if events is not None:
            events.extend(batch)

    engine = Engine(engine_config(STEP_S, publish_every=None if events is None else 40))
    driver = Driver(engine, remember, overhead_s=overhead_s)
    task = asyncio.create_task(driver.run())
    yield driver
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), task.exception()


def submit(driver: Driver, num_tokens: int, *, streams: bool = False) -> Answer:
    prompt = token_ids([1, 2, 3])
    request = Request(
        request_id=new_request_id(),
        program_id=ProgramId("p"),
        call_path="p/gen",
        prompt=prompt,
        sampling=SamplingParams(max_new_tokens=num_tokens),
    )
    script = script_for(prompt, num_tokens, WORDS)
    arrived_at = asyncio.get_running_loop().time()
    answer = Answer(request, script, asyncio.Event(), streams, arrived_at)
    driver.submit(answer)
    return answer


async def finished(answer: Answer) -> Finished:
    async with asyncio.timeout(10):
        await answer.news.wait()
    assert answer.finished is not None
    return answer.finished


async def test_a_process_that_is_late_changes_nothing_of_what_is_computed() -> None:
    async with driven() as driver:
        answer = submit(driver, 20)
        await asyncio.sleep(3 * STEP_S)
        time.sleep(0.05)
        end = await finished(answer)
        assert end.submitted_at == answer.arrived_at
        assert end.finished_at == pytest.approx(answer.arrived_at + 20 * STEP_S, abs=1e-9)
        assert (driver.lateness.num, answer.num_ready) == (20, 20)
        assert driver.lateness.max_s > 0.01


async def test_what_arrives_while_the_process_sleeps_is_computed_after_it_arrived() -> None:
    async with driven() as driver:
        first = submit(driver, 20)
        await asyncio.sleep(3 * STEP_S)
        time.sleep(0.01)
        second = submit(driver, 5)
        ends = await finished(first), await finished(second)
        assert ends[1].first_token_at is not None
        assert ends[1].first_token_at >= second.arrived_at + STEP_S
        assert ends[0].finished_at == pytest.approx(first.arrived_at + 21 * STEP_S, abs=1e-9)


async def test_a_request_enters_the_engine_after_its_overhead() -> None:
    async with driven(overhead_s=0.005) as driver:
        answer = submit(driver, 3)
        assert driver.load().num_waiting == 1
        end = await finished(answer)
        assert end.submitted_at == answer.arrived_at + 0.005
        assert end.finished_at == pytest.approx(end.submitted_at + 3 * STEP_S, abs=1e-9)


async def test_a_request_aborted_in_its_overhead_never_runs() -> None:
    async with driven(overhead_s=0.005) as driver:
        aborted, other = submit(driver, 3), submit(driver, 3)
        driver.abort(aborted.request.request_id)
        await finished(other)
        assert (aborted.is_aborted, aborted.finished, aborted.num_ready) == (True, None, 0)
        assert (driver.num_unfinished, driver.served.output_tokens) == (0, 3)


async def test_only_an_answer_that_streams_tells_of_every_token() -> None:
    async with driven() as driver:
        quiet, streamed = submit(driver, 5), submit(driver, 5, streams=True)
        seen = []
        while streamed.ended_at is None:
            await streamed.news.wait()
            streamed.news.clear()
            seen.append(streamed.num_ready)
        assert seen == [1, 2, 3, 4, 5]
        assert quiet.num_ready == 5


async def test_flushing_an_idle_engine_is_told_at_once() -> None:
    events: list[CacheEvent] = []
    async with driven(events=events) as driver:
        await finished(submit(driver, 1))
        assert driver.flush_cache()
        assert isinstance(events[-1], CacheCleared)


async def test_a_failure_of_the_driver_fails_who_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: Engine) -> None:
        raise AssertionError("the engine is broken")

    monkeypatch.setattr(Engine, "finish", fail)
    with pytest.raises(AssertionError, match="the engine is broken"):
        async with running() as emulated:
            await emulated.generate(1, 2, 3)


def test_a_configuration_survives_its_way_to_a_child() -> None:
    given = config(
        engine={"order": "fcfs", "chunk_tokens": None, "publish_every": 40},
        overhead_s=0.1,
        model_path="/model",
        kv_events=KvEventsConfig(publisher="zmq", bind=True),
    )
    assert EmulatedConfig.from_json(given.to_json()) == given
    assert EmulatedConfig.from_json(config().to_json()) == config()
