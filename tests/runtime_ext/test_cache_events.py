"""What runtimes publish of their caches: decoded, and not believed if it is not true."""

from typing import Any

import msgspec
import pytest

from preble_sgl.core import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    CacheEvent,
    WorkerId,
    block_hashes,
    token_ids,
)
from preble_sgl.runtime_ext.cache_events import (
    BadEvents,
    EventReader,
    EventSource,
    event_source,
    events_of,
    sequence_number,
)
from preble_sgl.runtime_ext.emulated.kv_publisher import as_map
from preble_sgl.sim.cache_news import CacheNews, root_pages

DESCRIBED = {
    "publisher": "zmq",
    "endpoint_host": "*",
    "endpoint_port_base": 5557,
    "topic": "kv",
    "block_size": 1,
    "dp_size": 1,
}


def batch(*events: CacheEvent | dict[str, Any]) -> bytes:
    maps = [event if isinstance(event, dict) else as_map(event) for event in events]
    return msgspec.msgpack.encode([1.5, maps, 0])


def stored(page_size: int, num_pages: int, namespace: str = "") -> list[CacheEvent]:
    """Return what a runtime tells that stores some pages, and then as many behind them."""
    news = CacheNews(page_size)
    ids = token_ids(range(2 * num_pages * page_size)).tobytes()
    middle = len(ids) // 2
    before = news.stored(root_pages(namespace), ids[:middle])
    news.stored(before, ids[middle:])
    return news.take()


def reader() -> EventReader:
    return EventReader(WorkerId("w"))


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize("namespace", ["", "tenant"])
def test_events_are_read_as_they_were_told_and_every_page_is_checked(page_size: int, namespace: str) -> None:
    events = [*stored(page_size, 3, namespace), BlocksRemoved(block_hashes([1, -2])), CacheCleared()]
    one = reader()
    assert one.read(batch(*events)) == events
    assert one.num_checked_blocks == 6


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_page_that_is_not_named_by_its_tokens_is_not_believed(page_size: int) -> None:
    first, second = stored(page_size, 2)
    for event in (first, second):
        assert isinstance(event, BlocksStored)
        event.token_ids[-1] += 1
        with pytest.raises(BadEvents, match="runtime w publishes pages that are not named by their tokens"):
            reader_after(first, but=event).read(batch(event))
        event.token_ids[-1] -= 1


def reader_after(first: CacheEvent, *, but: CacheEvent) -> EventReader:
    one = reader()
    if first is not but:
        one.read(batch(first))
    return one


def test_pages_behind_unknown_ones_are_taken_unchecked() -> None:
    _, second = stored(4, 2)
    one = reader()
    assert one.read(batch(second)) == [second]
    assert one.num_checked_blocks == 0


def test_copies_outside_the_gpu_and_events_of_later_releases_are_left_out() -> None:
    first, _ = stored(1, 2)
    host = as_map(first) | {"medium": "CPU_PINNED"}
    later = {"type": "BlockDreamt", "block_hashes": [1], "of": "sheep"}
    assert reader().read(batch(host, later, as_map(first) | {"session_id": "s", "lora_name": None})) == [
        first
    ]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xff",
        msgspec.msgpack.encode({"ts": 1}),
        msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": ["x"]}]]),
        msgspec.msgpack.encode(
            [1.0, [{"type": "BlockStored", "block_hashes": [1, 2], "token_ids": [1], "block_size": 4}]]
        ),
        msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": [1 << 63]}]]),
    ],
)
def test_what_is_not_understood_is_one_error_that_names_the_runtime(payload: bytes) -> None:
    with pytest.raises(BadEvents, match="runtime w publishes a batch that is not understood") as caught:
        reader().read(payload)
    assert caught.value.worker_id == "w"


def test_a_message_has_three_frames_and_its_number_is_signed() -> None:
    assert events_of([b"kv", (7).to_bytes(8, "big"), batch(CacheCleared())], reader()) == (
        7,
        [CacheCleared()],
    )
    assert sequence_number((-1).to_bytes(8, "big", signed=True)) == -1
    with pytest.raises(BadEvents, match="a message of 2 frames instead of 3"):
        events_of([b"kv", b""], reader())


def test_a_wildcard_address_is_that_of_the_server() -> None:
    told = DESCRIBED | {"replay_endpoint_port_base": 5558, "load_endpoint_port_base": 5559}
    assert event_source({"kv_events": told}, "http://gpu7:30000/") == EventSource(
        endpoint="tcp://gpu7:5557",
        replay_endpoint="tcp://gpu7:5558",
        topic="kv",
        load_endpoint="tcp://gpu7:5559",
    )
    fixed = event_source({"kv_events": DESCRIBED | {"endpoint_host": "10.0.0.1"}}, "http://gpu7:30000")
    assert fixed == EventSource(endpoint="tcp://10.0.0.1:5557", replay_endpoint=None, topic="kv")


@pytest.mark.parametrize("told", [None, DESCRIBED | {"publisher": "null"}, DESCRIBED | {"dp_size": 2}])
def test_who_tells_nothing_or_tells_of_several_caches_is_no_source(told: Any) -> None:
    assert event_source({"kv_events": told}, "http://gpu7:30000") is None
