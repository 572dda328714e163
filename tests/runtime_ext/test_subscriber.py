"""Following what runtimes publish: complete and in order, whatever gets lost on the way."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest
import zmq
import zmq.asyncio

from preble_sgl.core import BlocksStored, CacheCleared, CacheEvent, WorkerId, token_ids
from preble_sgl.global_sched.cache_feed import CacheFeed, FeedResult
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.runtime_ext import subscriber
from preble_sgl.runtime_ext.protocol import RuntimeLoad
from preble_sgl.runtime_ext.subscriber import CacheSubscriber, follow_loads
from preble_sgl.sim.cache_news import CacheNews, root_pages
from tests.runtime_ext.scripted_publisher import ScriptedPublisher, scripted_publisher

WORKER = WorkerId("w")


class Follower:
    """A sink with a real tree; remembers what became of every batch."""

    def __init__(self, capacity: int = 10_000, page_size: int = 1) -> None:
        self.tree = RadixTree(60.0)
        self.tree.add_worker(WORKER, capacity=capacity, page_size=page_size)
        self.feed = CacheFeed(self.tree, WORKER, page_size)
        self.results: list[tuple[int, str]] = []
        self.num_lost = 0

    def receive(self, seq: int, events: Sequence[CacheEvent]) -> FeedResult:
        result = self.feed.receive(seq, events)
        self.results.append((seq, result.status))
        return result

    def lose(self) -> None:
        self.num_lost += 1
        self.feed.lose()

    def has(self, number: int) -> bool:
        """Return whether the prompt of that number is known to be cached."""
        return self.tree.match("", prompt(number)).len_on(WORKER) == 8

    async def wait_for(self, *numbers: int) -> None:
        while not all(self.has(number) for number in numbers):
            await asyncio.sleep(0.005)


def prompt(number: int) -> bytes:
    return token_ids([1000 + number, *range(7)]).tobytes()


def stores(number: int) -> CacheEvent:
    news = CacheNews(1)
    news.stored(root_pages(""), prompt(number))
    (event,) = news.take()
    return event


@asynccontextmanager
async def following(publisher: ScriptedPublisher, follower: Follower) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(CacheSubscriber(publisher.source, WORKER, follower).follow())
    try:
        await publisher.wait_subscribed()
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        follower.tree.check_invariants()


async def test_what_was_published_before_is_replayed_and_then_it_goes_on_live() -> None:
    follower = Follower()
    async with scripted_publisher() as publisher:
        await publisher.publish(CacheCleared())
        await publisher.publish(stores(1))
        async with following(publisher, follower):
            await follower.wait_for(1)
            await publisher.publish(stores(2))
            await follower.wait_for(1, 2)
    assert follower.results == [(0, "started"), (1, "applied"), (2, "applied")]
    assert publisher.asked == [0]


async def test_nothing_is_placed_by_the_past_that_a_replay_goes_through() -> None:
    follower, seen = Follower(), set()

    async def look() -> None:
        while True:
            seen.add(len(follower.results))
            await asyncio.sleep(0)

    async with scripted_publisher() as publisher:
        await publisher.publish(CacheCleared())
        for number in range(20):
            await publisher.publish(stores(number))
        await publisher.publish(CacheCleared())
        looking = asyncio.create_task(look())
        async with following(publisher, follower):
            while not follower.results:
                await asyncio.sleep(0.005)
        looking.cancel()
    assert seen <= {0, 22}


async def test_a_follower_has_caught_up_after_the_replay_or_when_there_is_none() -> None:
    async with scripted_publisher() as publisher:
        await publisher.publish(stores(1))
        for source in (publisher.source, replace(publisher.source, replay_endpoint=None)):
            follower = Follower()
            subscriber = CacheSubscriber(source, WORKER, follower)
            task = asyncio.create_task(subscriber.follow())
            await subscriber.caught_up.wait()
            assert follower.has(1) == (source.replay_endpoint is not None)
            task.cancel()


async def test_a_gap_is_filled_from_where_it_begins() -> None:
    follower = Follower()
    async with scripted_publisher() as publisher:
        await publisher.publish(CacheCleared())
        async with following(publisher, follower):
            await publisher.publish(stores(1))
            await follower.wait_for(1)
            await publisher.publish(stores(2), lost=True)
            await publisher.publish(stores(3))
            await follower.wait_for(1, 2, 3)
            await publisher.publish(stores(4))
            await follower.wait_for(4)
    assert publisher.asked == [0, 2]
    assert follower.num_lost == 0
    assert follower.results[-1] == (4, "applied")


async def test_what_a_replay_does_not_have_any_more_is_lost_until_a_history_starts() -> None:
    follower = Follower()
    async with scripted_publisher() as publisher:
        await publisher.publish(CacheCleared())
        async with following(publisher, follower):
            await publisher.publish(stores(1))
            await follower.wait_for(1)
            await publisher.publish(stores(2), lost=True)
            publisher.kept.clear()
            await publisher.publish(stores(3))
            while not follower.num_lost:
                await asyncio.sleep(0.005)
            assert not follower.feed.is_live
            assert follower.has(1)  # believed, no longer known
            await publisher.publish(stores(4))
            await publisher.publish(CacheCleared(), stores(5))
            await follower.wait_for(5)
            assert follower.feed.is_live
            assert not follower.has(1)
    assert publisher.asked == [0, 2]  # nothing was asked for while there was no hope
    assert follower.num_lost == 1


async def test_a_replay_without_an_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber, "REPLAY_S", 0.05)
    follower = Follower()
    async with scripted_publisher() as publisher:
        publisher.is_deaf = True
        await publisher.publish(CacheCleared())
        async with following(publisher, follower):
            while not follower.num_lost:
                await asyncio.sleep(0.005)
            await publisher.publish(CacheCleared(), stores(1))
            await follower.wait_for(1)


async def test_a_runtime_that_starts_again_is_learnt_afresh_even_under_the_awaited_number() -> None:
    follower = Follower()
    async with scripted_publisher() as publisher:
        await publisher.publish(CacheCleared())
        async with following(publisher, follower) as task:
            await publisher.publish(stores(1))
            await follower.wait_for(1)
            source = publisher.source
            publisher.close()
            async with scripted_publisher(source) as second:
                await second.publish(CacheCleared())
                await second.publish(stores(2))
                await second.wait_subscribed()
                await asyncio.sleep(0.05)
                await second.publish(stores(3))  # batch 2, which is the awaited number
                await follower.wait_for(2, 3)
                assert not follower.has(1)
                assert second.asked == [0]
            assert not task.done()


async def test_a_number_that_was_live_before_is_of_another_process() -> None:
    follower = Follower()
    async with scripted_publisher() as publisher:
        await publisher.publish(CacheCleared())
        async with following(publisher, follower):
            for number in (1, 2, 3):
                await publisher.publish(stores(number))
            await follower.wait_for(3)
            publisher.kept.clear()
            publisher._next = 0
            await publisher.publish(CacheCleared(), lost=True)
            await publisher.publish(stores(7))  # batch 1 again
            await follower.wait_for(7)
            assert not follower.has(3)
    assert publisher.asked == [0, 0]


async def test_events_that_cannot_be_used_end_the_feed_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    follower = Follower()
    async with scripted_publisher() as publisher:
        await publisher.publish(CacheCleared())
        async with following(publisher, follower) as task:
            await publisher.publish(stores(1))
            await follower.wait_for(1)
            wrong = stores(2)
            assert isinstance(wrong, BlocksStored)
            wrong.token_ids[3] += 1
            await publisher.publish(wrong)
            await task
    assert follower.num_lost == 1
    assert not follower.feed.is_live
    assert "its cache is estimated from now on" in caplog.text


async def test_loads_are_told_as_they_are_pushed() -> None:
    context = zmq.asyncio.Context()
    loads: asyncio.Queue[RuntimeLoad] = asyncio.Queue()
    socket = context.socket(zmq.XPUB)
    socket.bind("tcp://127.0.0.1:*")
    following = asyncio.create_task(
        follow_loads(socket.getsockopt_string(zmq.LAST_ENDPOINT), loads.put_nowait)
    )
    try:
        await socket.recv()
        stat = ["LoadStat", 3, 2, 500, 1000, 0, 40, 600, 64, 7000, 2_500_000, "of a later release"]
        await socket.send_multipart([b"load", bytes(8), msgspec.msgpack.encode(stat)])
        assert await loads.get() == RuntimeLoad(
            num_running=3,
            num_waiting=2,
            waiting_tokens=40,
            used_tokens=500,
            kv_tokens=1000,
            prefilled_tokens=7000,
            prefill_busy_s=2.5,
        )
        await socket.send_multipart([b"load", bytes(8), b"?"])
        await following  # ends by itself, with one line in the log
    finally:
        following.cancel()
        socket.close(linger=0)
        context.destroy(linger=0)
