"""The scheduler's state as plain values, for the live page and for debugging."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from preble_sgl.core import PlacementReason, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """One worker. `used_tokens` estimates its KV cache, what placed requests will add included.

    `backlog_s`: worker seconds of what waits for it and is not bound yet. `num_held`: bound to it and waiting
    for a prefix to be computed there; `num_prefill`, `num_decode`: sent to it, before and after the first
    token. `prompt_tokens`, `cached_tokens` and `output_tokens` sum over the `num_finished` requests; what the
    runtime reported, not what was predicted.
    """

    worker_id: WorkerId
    is_draining: bool
    num_held: int
    num_prefill: int
    num_decode: int
    num_foreign: int
    backlog_s: float
    pending_prefill_tokens: int
    outstanding_s: float
    recent_s: float
    used_tokens: int
    kv_tokens: int
    num_finished: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


FeedCount = Literal[
    "applied",
    "started",
    "gap",
    "old",
    "orphan_blocks",
    "searches",
    "unknown_blocks",
    "in_use_blocks",
    "refuted_tokens",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedSnapshot:
    """What a runtime tells of its cache. `is_live`: nothing is missing; it surely has `stored_tokens`.

    `counts`: batches by what became of them (applied, started, gap, old); blocks stored behind a page that is
    unknown (orphan_blocks), removed and unknown (unknown_blocks), removed while requests here stood on them
    (in_use_blocks); pages that had to be searched for (searches); tokens that finished requests must have
    left in the cache and the runtime did not confirm (refuted_tokens).
    """

    is_live: bool
    next_seq: int
    stored_tokens: int
    counts: Mapping[FeedCount, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSnapshot:
    """The whole scheduler. Requests are queued (no worker yet), held (worker chosen, not sent) or running.

    `num_waiting`: those queued because their program may not be opened yet.
    """

    policy: str
    num_queued: int
    num_held: int
    num_running: int
    num_waiting: int
    num_open_programs: int
    num_nodes: int
    workers: tuple[WorkerSnapshot, ...]
    num_placements: Mapping[PlacementReason, int]
    cache_feeds: Mapping[WorkerId, FeedSnapshot] = field(default_factory=dict)
