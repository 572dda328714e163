"""Whose turn it is."""

import asyncio
from collections.abc import Callable

import pytest

from preble_sgl.server.admission import Admission
from preble_sgl.server.errors import ApiError
from preble_sgl.server.tenants import Tenant

BUSY, QUIET = Tenant("busy"), Tenant("quiet")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(
    max_running: int, max_waiting: int = 100, clock: Callable[[], float] | None = None
) -> Admission:
    return Admission(max_running, max_waiting, clock or Clock())


async def hold(who: Admission, tenant: Tenant, order: list[str], until: asyncio.Event) -> None:
    async with who.turn(tenant):
        order.append(tenant.name)
        await until.wait()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_tenants_take_turns_however_many_requests_one_has() -> None:
    one = admission(1)
    order: list[str] = []
    ends = [asyncio.Event() for _ in range(6)]
    tenants = [BUSY, BUSY, BUSY, BUSY, QUIET, QUIET]
    tasks = []
    for tenant, end in zip(tenants, ends, strict=True):
        tasks.append(asyncio.create_task(hold(one, tenant, order, end)))
        await settle()
    assert one.num_running == 1
    assert one.num_waiting == 5
    for end in ends:
        end.set()
    await asyncio.gather(*tasks)
    assert order == ["busy", "busy", "quiet", "busy", "quiet", "busy"]
    assert one.num_running == one.num_waiting == 0


async def test_a_full_line_is_refused_with_when_to_come_again() -> None:
    clock = Clock()
    one = admission(1, 0, clock)
    for _ in range(60):  # requests end every 8 seconds
        async with one.turn(BUSY):
            clock.now += 8
    async with one.turn(BUSY):
        with pytest.raises(ApiError) as refused:
            async with one.turn(QUIET):
                pass
    assert refused.value.status == 429
    assert refused.value.retry_after_s == 8
    assert one.num_running == 0


async def test_a_tenant_waits_at_its_own_limit_and_delays_nobody() -> None:
    many = admission(10)
    limited, order = Tenant("limited", max_running=1), list[str]()
    end = asyncio.Event()
    tasks = [asyncio.create_task(hold(many, limited, order, end)) for _ in range(2)]
    await settle()
    assert order == ["limited"]
    async with many.turn(QUIET):
        assert many.num_running == 2
    end.set()
    await asyncio.gather(*tasks)
    assert order == ["limited", "limited"]


async def test_who_gives_up_waiting_leaves_no_gap() -> None:
    one = admission(1)
    order: list[str] = []
    end = asyncio.Event()
    first = asyncio.create_task(hold(one, BUSY, order, end))
    await settle()
    second, third = (asyncio.create_task(hold(one, QUIET, order, end)) for _ in range(2))
    await settle()
    second.cancel()
    await settle()
    assert one.num_waiting == 1
    end.set()
    await asyncio.gather(first, third)
    assert order == ["busy", "quiet"]
    assert one.num_running == 0


async def test_who_is_cancelled_in_the_moment_of_its_turn_gives_it_on() -> None:
    one = admission(1)
    order: list[str] = []
    end = asyncio.Event()
    first = asyncio.create_task(hold(one, BUSY, order, end))
    await settle()
    second, third = (asyncio.create_task(hold(one, QUIET, order, end)) for _ in range(2))
    await settle()
    end.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert order[-1] == "quiet"
    assert one.num_running == one.num_waiting == 0
