"""The plugin inside real SGLang: the order of the wait queue, pins, prompt cache events, and the marker."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from preble_sgl.core import TokenIds, WorkerId, token_ids
from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.client import SglangRuntime
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.launcher import launch_runtimes
from preble_sgl.runtime_ext.plugin.contract import NEEDS
from preble_sgl.sim.wait_queue import WaitOrder
from tests.runtime_ext.plugin.queued import KV_TOKENS, order_in_model, order_on_runtime
from tests.runtime_ext.requests import request, run

pytestmark = pytest.mark.sglang

ORDERS: tuple[tuple[WaitOrder, WaitOrder], ...] = (("preble_groups", "las"), ("mlfq", "spf"))
SMALL_KV = 2000


def specs(model: Path, *settings: dict[str, Any]) -> list[LaunchSpec]:
    return [
        LaunchSpec(model_path=model, worker_id=WorkerId(f"w{number}"), **one)
        for number, one in enumerate(settings)
    ]


@pytest.mark.parametrize("orders", ORDERS, ids=" and ".join)
async def test_the_order_of_service_is_that_of_the_pure_function(
    tiny_model: Path, orders: tuple[WaitOrder, WaitOrder]
) -> None:
    one_at_a_time = {"flags": {"max_running_requests": 1}, "kv_tokens": KV_TOKENS}
    async with launch_runtimes(specs(tiny_model, *({"order": o, **one_at_a_time} for o in orders))) as pair:
        for order, runtime in zip(orders, pair, strict=True):
            assert runtime.plugin is not None
            assert runtime.plugin.order == order
            assert await order_on_runtime(runtime) == order_in_model(order)


@pytest.fixture(scope="module")
def urls(tiny_model: Path) -> Iterator[tuple[str, str]]:
    """Two runtimes with little KV: one with the plugin, one stock."""
    settings: list[dict[str, Any]] = [
        {"kv_tokens": SMALL_KV},
        {"kv_tokens": SMALL_KV, "plugin": False, "order": "preble_groups"},
    ]
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(launch_runtimes(specs(tiny_model, *settings))) as (ours, stock),
    ):
        # Without the plugin, priorities have to stand for the order.
        assert (ours.info.wire_order, stock.info.wire_order) == (None, "preble_groups")
        yield ours.info.url, stock.info.url


@asynccontextmanager
async def attached(url: str) -> AsyncIterator[SglangRuntime]:
    async with SglangRuntime.attach(url) as runtime:
        await runtime.flush_cache()
        yield runtime


def tokens(seed: int, length: int) -> TokenIds:
    rng = random.Random(seed)
    return token_ids(rng.randrange(10, 2000) for _ in range(length))


async def turn_the_cache_over(runtime: SglangRuntime, seed: int) -> None:
    """Compute three times as many tokens as fit."""
    for number in range(12):
        await runtime.warm(tokens(1000 * seed + number, 500))


async def test_a_pinned_prefix_survives_what_evicts_its_twin_until_it_is_let_go(
    urls: tuple[str, str],
) -> None:
    pinned, twin = tokens(1, 300), tokens(2, 300)
    async with attached(urls[0]) as runtime:
        assert await runtime.pin("p", pinned, expires_s=600) == 300
        assert await runtime.warm(twin) == 300
        await turn_the_cache_over(runtime, 1)
        assert await runtime.warm(pinned) == 1  # SGLang computes the last token of a cached prompt again
        assert await runtime.warm(twin) == 300
        await runtime.unpin("p")
        await turn_the_cache_over(runtime, 2)
        assert await runtime.warm(pinned) == 300


async def test_a_pin_ends_when_it_expires(urls: tuple[str, str]) -> None:
    async with attached(urls[0]) as runtime:
        assert await runtime.pin("p", tokens(3, 300), expires_s=0.5) == 300
        while await runtime.read_pins():
            await asyncio.sleep(0.2)
        await turn_the_cache_over(runtime, 3)
        assert await runtime.warm(tokens(3, 300)) == 300


async def test_pins_hold_no_more_than_their_share(urls: tuple[str, str]) -> None:
    async with attached(urls[0]) as runtime:
        assert await runtime.pin("a", tokens(4, 400), expires_s=600) == 400
        assert await runtime.pin("b", tokens(5, 300), expires_s=600) == 0  # 0.3 of 2000 is 600
        assert await runtime.pin("c", tokens(6, 200), expires_s=600) == 200
        assert await runtime.read_pins() == {"a": 400, "c": 200}
        assert await runtime.pin("a", tokens(5, 300), expires_s=600) == 300  # in place of the first
        assert await runtime.read_pins() == {"a": 300, "c": 200}


async def test_flushing_forgets_pins_and_the_server_lives_on(urls: tuple[str, str]) -> None:
    async with attached(urls[0]) as runtime:
        assert await runtime.pin("p", tokens(7, 300), expires_s=600) == 300
        await runtime.flush_cache()
        assert await runtime.read_pins() == {}
        await turn_the_cache_over(runtime, 4)
        assert await runtime.pin("p", tokens(7, 300), expires_s=600) == 300


async def test_a_pin_starves_nobody(urls: tuple[str, str]) -> None:
    async with attached(urls[0]) as runtime:
        assert await runtime.pin("p", tokens(8, 500), expires_s=600) == 500
        chunks = await run(runtime, request(tokens(9, 1700), max_new_tokens=4, ignore_eos=True))
        assert chunks[-1].finish_reason == "length"
        assert await runtime.read_pins() == {}


async def test_a_pin_that_lasts_no_time_is_refused(urls: tuple[str, str]) -> None:
    async with attached(urls[0]) as runtime:
        with pytest.raises(InputError, match="expires_s=0: must be above 0"):
            await runtime.pin("p", tokens(1, 30), expires_s=0)


async def test_a_stock_runtime_has_no_marker_and_takes_no_pins(urls: tuple[str, str]) -> None:
    async with attached(urls[1]) as runtime:
        assert runtime.plugin is None
        assert await runtime.pin("p", tokens(1, 300), expires_s=600) == 0
        await runtime.unpin("p")
    async with attached(urls[0]) as runtime:
        assert runtime.plugin is not None
        assert runtime.plugin.features == NEEDS.keys()
        assert runtime.plugin.errors == {}
