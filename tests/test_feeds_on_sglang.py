"""A fleet over real runtimes hears of their caches and of what others have them do."""

import asyncio

import pytest

from preble_sgl.core import RequestRecord
from preble_sgl.fleet import Fleet
from preble_sgl.runtime_ext.client import SglangRuntime
from tests.faults.batches import batch, run_batch
from tests.runtime_ext.requests import request

pytestmark = pytest.mark.sglang


async def drain(runtime: SglangRuntime) -> None:
    async for _ in runtime.stream(request([5, 6, 7], max_new_tokens=3000, ignore_eos=True)):
        pass


async def test_requests_of_others_show_as_foreign_load_and_go(runtime_urls: tuple[str, str]) -> None:
    async with Fleet.attach(runtime_urls) as fleet, SglangRuntime.attach(runtime_urls[0]) as other:
        strangers = [asyncio.create_task(drain(other)) for _ in range(2)]
        while (foreign := [worker["num_foreign"] for worker in fleet.describe_workers()]) != [2, 0]:
            await asyncio.sleep(0.05)
        for stranger in strangers:
            stranger.cancel()
        await asyncio.gather(*strangers, return_exceptions=True)
        while any(foreign):
            await asyncio.sleep(0.05)
            foreign = [worker["num_foreign"] for worker in fleet.describe_workers()]


async def test_placements_match_what_runtimes_find_cached(runtime_urls: tuple[str, str]) -> None:
    async with Fleet.attach(runtime_urls) as fleet:
        await fleet.flush_cache()
        records: list[RequestRecord] = []
        fleet.on_record(records.append)
        for one in batch(16, 8):
            await run_batch(fleet, [one])
            await asyncio.sleep(0.05)
        assert [r.placement.matched_len for r in records] == [r.usage.cached_tokens for r in records]
        assert sum(r.usage.cached_tokens for r in records) >= 12 * 300


async def test_a_fleet_knows_from_its_first_call_what_is_cached(runtime_urls: tuple[str, str]) -> None:
    records: list[RequestRecord] = []
    for _ in range(2):
        async with Fleet.attach(runtime_urls) as fleet:
            fleet.on_record(records.append)
            await run_batch(fleet, batch(1, 8))
            await asyncio.sleep(0.05)
    again = records[1]
    assert again.worker_id == records[0].worker_id
    assert again.placement.matched_len == again.usage.cached_tokens >= 300
