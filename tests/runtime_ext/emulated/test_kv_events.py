"""Cache events: what subscribers and latecomers receive is what the engine has, under the same hashes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig, KvEventsConfig
from tests.global_sched.fake_cache import hashes
from tests.runtime_ext.emulated.runtimes import Emulated, config, running

zmq = pytest.importorskip("zmq")
zmq_asyncio = pytest.importorskip("zmq.asyncio")
msgpack = pytest.importorskip("msgspec.msgpack")

END = (-1).to_bytes(8, "big", signed=True)
TOPIC = b"kv"


def publishing(page_size: int = 1, kv_tokens: int = 2000, publish_every: int = 1) -> EmulatedConfig:
    events = KvEventsConfig(
        publisher="zmq", endpoint="tcp://*:*", replay_endpoint="tcp://127.0.0.1:*", topic=TOPIC.decode()
    )
    engine = {"page_size": page_size, "kv_tokens": kv_tokens, "publish_every": publish_every}
    return config(engine=engine, kv_events=events)


class Mirror:
    """The pages that a runtime has, as far as it has told."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        self.num_cleared = 0

    def hear(self, payload: bytes) -> None:
        _, events, rank = msgpack.decode(payload)
        assert rank == 0
        for event in events:
            getattr(self, event["type"])(event)

    def AllBlocksCleared(self, event: dict[str, Any]) -> None:
        self.num_cleared += 1
        self.pages.clear()

    def BlockRemoved(self, event: dict[str, Any]) -> None:
        assert set(event) == {"type", "block_hashes", "medium"}
        for page in event["block_hashes"]:
            del self.pages[page]

    def BlockStored(self, event: dict[str, Any]) -> None:
        assert (event["medium"], event["lora_id"]) == ("GPU", None)
        parent, size = event["parent_block_hash"], event["block_size"]
        assert parent is None or parent in self.pages
        for index, page in enumerate(event["block_hashes"]):
            self.pages[page] = parent, tuple(event["token_ids"][index * size : (index + 1) * size])
            parent = page


async def replay(emulated: Emulated, context: Any, start: int = 0) -> list[tuple[int, bytes]]:
    """Ask for the batches from `start` on."""
    descriptor = (await emulated.get("/server_info")).json["kv_events"]
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{descriptor['replay_endpoint_port_base']}")
    await dealer.send_multipart([b"", start.to_bytes(8, "big")])
    batches = []
    while (message := await dealer.recv_multipart())[2] != END:
        empty, topic, number, payload = message
        assert (empty, topic) == (b"", TOPIC)
        batches.append((int.from_bytes(number, "big"), payload))
    assert message == [b"", b"", END, b""]
    return batches


async def replayed(emulated: Emulated, context: Any) -> Mirror:
    mirror = Mirror()
    for _, payload in await replay(emulated, context):
        mirror.hear(payload)
    return mirror


@asynccontextmanager
async def zmq_context() -> AsyncIterator[Any]:
    context = zmq_asyncio.Context()
    async with asyncio.timeout(20):
        try:
            yield context
        finally:
            context.destroy(linger=0)


async def test_the_pages_told_are_those_of_the_prompt_and_the_output() -> None:
    async with running(publishing()) as emulated, zmq_context() as context:
        answer = await emulated.generate(*range(60), max_new_tokens=5)
        mirror = await replayed(emulated, context)
    cached = [*range(60), *answer["output_ids"][:-1]]
    assert list(mirror.pages) == hashes(cached)
    assert [tokens for _, tokens in mirror.pages.values()] == [(token,) for token in cached]


async def test_only_whole_pages_are_told_and_a_salt_is_part_of_the_hash() -> None:
    async with running(publishing(page_size=16)) as emulated, zmq_context() as context:
        await emulated.generate(*range(60), cache_salt="tenant")
        mirror = await replayed(emulated, context)
    assert list(mirror.pages) == hashes(range(48), 16, "tenant")


async def test_numbers_begin_at_zero_with_an_empty_cache_and_replay_begins_where_asked() -> None:
    async with running(publishing()) as emulated, zmq_context() as context:
        await emulated.generate(1, 2, 3)
        batches = await replay(emulated, context)
        rest = await replay(emulated, context, start=2)
    assert [number for number, _ in batches] == list(range(len(batches)))
    assert msgpack.decode(batches[0][1])[1:] == [[{"type": "AllBlocksCleared"}], 0]
    assert rest == batches[2:]


async def test_a_subscriber_hears_what_replay_repeats() -> None:
    async with running(publishing(kv_tokens=400)) as emulated, zmq_context() as context:
        port = (await emulated.get("/server_info")).json["kv_events"]["endpoint_port_base"]
        subscriber = context.socket(zmq.SUB)
        subscriber.subscribe(TOPIC)
        subscriber.connect(f"tcp://127.0.0.1:{port}")
        heard: list[tuple[int, bytes]] = []
        while not heard:  # until the subscription has reached the publisher
            await emulated.get("/flush_cache")
            if await subscriber.poll(50):
                heard.append(await receive(subscriber))
        for start in (0, 100, 200, 300, 0):  # more than fits: some are evicted
            await emulated.generate(*range(start, start + 150), max_new_tokens=20)
        await emulated.get("/flush_cache")
        await emulated.generate(*range(30))
        batches = await replay(emulated, context)
        while heard[-1][0] != batches[-1][0]:
            heard.append(await receive(subscriber))
    assert heard == batches[heard[0][0] :]
    mirror = Mirror()
    for _, payload in batches:
        mirror.hear(payload)
    assert list(mirror.pages)[:30] == hashes(range(30))
    assert any(event["type"] == "BlockRemoved" for _, data in batches for event in msgpack.decode(data)[1])


async def receive(subscriber: Any) -> tuple[int, bytes]:
    topic, number, payload = await subscriber.recv_multipart()
    assert topic == TOPIC
    return int.from_bytes(number, "big"), payload


async def test_the_descriptor_is_that_of_sglang() -> None:
    async with running(publishing(page_size=16)) as emulated:
        descriptor = (await emulated.get("/server_info")).json["kv_events"]
    ports = [descriptor.pop(name) for name in ("endpoint_port_base", "replay_endpoint_port_base")]
    assert all(0 < port < 65536 for port in ports)
    assert descriptor == {
        "publisher": "zmq",
        "endpoint_host": "127.0.0.1",
        "topic": "kv",
        "block_size": 16,
        "dp_size": 1,
    }


async def test_a_port_in_use_is_refused() -> None:
    async with zmq_context() as context:
        taken = context.socket(zmq.PUB)
        port = taken.bind_to_random_port("tcp://127.0.0.1")
        events = KvEventsConfig(publisher="zmq", endpoint=f"tcp://127.0.0.1:{port}", bind=True)
        engine = {"publish_every": 40}
        with pytest.raises(InputError, match=f"tcp://127.0.0.1:{port} cannot be used"):
            async with running(config(kv_events=events, engine=engine)):
                pass


def test_events_of_an_engine_that_tells_none_are_refused() -> None:
    with pytest.raises(InputError, match="set its publish_every"):
        config(kv_events=KvEventsConfig(publisher="zmq"))


def test_the_flag_is_read_as_sglang_writes_it() -> None:
    assert KvEventsConfig.parse("{}").publisher == "null"
    flag = '{"publisher":"zmq","endpoint":"tcp://*:5","max_queue_size":9,"format":"default"}'
    assert KvEventsConfig.parse(flag) == KvEventsConfig(publisher="zmq", endpoint="tcp://*:5")
    assert KvEventsConfig.parse(flag).binds
    assert not KvEventsConfig(endpoint="tcp://127.0.0.1:5").binds


@pytest.mark.parametrize("flag", ["", "{", "[]", "5", '{"publisher": "kafka"}'])
def test_a_flag_that_is_none_is_refused(flag: str) -> None:
    with pytest.raises(InputError, match="kv-events-config"):
        KvEventsConfig.parse(flag)
