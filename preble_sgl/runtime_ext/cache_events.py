"""What an SGLang runtime publishes of its KV cache: where, in which form, and whether it is true.

A batch is `[topic, sequence as 8 bytes, msgpack [time, [event, ...], rank]]`; an event is a map with a
`type`. The names of pages are recomputed from their tokens and compared, so that a runtime that names them by
another rule is noticed and not believed.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import msgspec

from preble_sgl.core import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    CacheEvent,
    WorkerId,
    block_hashes,
    token_ids,
)
from preble_sgl.errors import PrebleError
from preble_sgl.sim.cache_news import PageHashes, hashed_pages, root_pages

WILDCARDS = ("*", "0.0.0.0", "::")
GPU = "GPU"
NUM_CHECKED_FIRST = 256
CHECK_EVERY = 32
"""Stored blocks are all checked at first, then one in so many: 8192 pages of one token take 14 ms."""
MAX_TAILS = 4096


class BadEvents(PrebleError):
    """A runtime publishes cache events that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSource:
    """Where a runtime publishes its cache events, and its load if it does. None: it does not."""

    endpoint: str
    replay_endpoint: str | None
    topic: str
    load_endpoint: str | None = None


def event_source(settings: Mapping[str, Any], url: str) -> EventSource | None:
    """Return what `/server_info` says of the publisher; None without one.

    None also with several data-parallel ranks: each has a cache of its own, and a worker here has one.
    """
    told = settings.get("kv_events")
    if not told or told.get("publisher") != "zmq" or told.get("dp_size", 1) != 1:
        return None
    host = told["endpoint_host"]
    host = urlsplit(url).hostname if host in WILDCARDS else host
    replay, load = told.get("replay_endpoint_port_base"), told.get("load_endpoint_port_base")
    return EventSource(
        endpoint=f"tcp://{host}:{told['endpoint_port_base']}",
        replay_endpoint=None if replay is None else f"tcp://{host}:{replay}",
        topic=told.get("topic", ""),
        load_endpoint=None if load is None else f"tcp://{host}:{load}",
    )


class _Event(msgspec.Struct, gc=False):
    """Any event; what a type does not have stays empty. Fields that are not known are skipped."""

    type: str
    block_hashes: list[int] = []
    parent_block_hash: int | None = None
    token_ids: list[int] = []
    block_size: int = 1
    medium: str | None = GPU
    cache_salt: str | None = None


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[_Event]


class EventReader:
    """Decodes and checks the batches of one runtime."""

    def __init__(self, worker_id: WorkerId) -> None:
        self._worker_id = worker_id
        self._decode = msgspec.msgpack.Decoder(_Batch).decode
        self._tails: OrderedDict[int, PageHashes] = OrderedDict()
        self._num_stored = 0
        self.num_checked_blocks = 0

    def read(self, payload: bytes) -> list[CacheEvent]:
        """Return the events of one batch that concern the GPU's cache. O(tokens).

        Raises BadEvents for a batch that is not understood, or a page that is not named by its tokens.
        """
        try:
            batch = self._decode(payload)
            return [read for event in batch.events if (read := self._read(event)) is not None]
        except (msgspec.MsgspecError, ValueError, OverflowError) as error:
            raise self.bad(f"a batch that is not understood: {error}") from error

    def _read(self, event: _Event) -> CacheEvent | None:
        if event.medium not in (GPU, None):
            return None
        match event.type:
            case "BlockStored":
                return self._checked(_stored(event))
            case "BlockRemoved":
                return BlocksRemoved(block_hashes(event.block_hashes))
            case "AllBlocksCleared":
                return CacheCleared()
        return None

    def _checked(self, stored: BlocksStored) -> BlocksStored:
        """Recompute the names of pages, of all at first and then of some, where what they follow is known."""
        self._num_stored += 1
        if self._num_stored > NUM_CHECKED_FIRST and self._num_stored % CHECK_EVERY:
            return stored
        before = root_pages(stored.namespace)
        if stored.parent_hash is not None:
            known = self._tails.get(stored.parent_hash)
            if known is None:
                return stored
            before = known
        pages = hashed_pages(before, stored.token_ids.tobytes(), stored.block_size)
        if pages.hashes != stored.block_hashes:
            raise self.bad("pages that are not named by their tokens: another rule, or another cache")
        self.num_checked_blocks += len(pages.hashes)
        if pages.hashes:
            self._remember(replace(pages, hashes=pages.hashes[-1:]))
        return stored

    def _remember(self, tail: PageHashes) -> None:
        self._tails[tail.hashes[0]] = tail
        if len(self._tails) > MAX_TAILS:
            self._tails.popitem(last=False)

    def bad(self, what: str) -> BadEvents:
        """Return the error for what cannot be used."""
        return BadEvents(f"runtime {self._worker_id} publishes {what}", worker_id=self._worker_id)


def _stored(event: _Event) -> BlocksStored:
    return BlocksStored(
        block_hashes=block_hashes(event.block_hashes),
        parent_hash=event.parent_block_hash,
        token_ids=token_ids(event.token_ids),
        block_size=event.block_size,
        namespace=event.cache_salt or "",
    )


def sequence_number(frame: bytes) -> int:
    """Return the number of a batch; -1 ends a replay."""
    return int.from_bytes(frame, "big", signed=True)


def events_of(frames: Sequence[bytes], reader: EventReader) -> tuple[int, list[CacheEvent]]:
    """Return the number and the events of a published message. Raises BadEvents."""
    if len(frames) != 3:
        raise reader.bad(f"a message of {len(frames)} frames instead of 3")
    return sequence_number(frames[1]), reader.read(frames[2])
