"""What a policy is: pure code that looks at one request and the fleet and picks a worker.

A policy may keep state of its own between decisions (a cursor), but it never changes what it is shown, and
the same calls with the same random numbers give the same decisions.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from preble_sgl.core import PlacementReason, Request, RequestId, WorkerId
from preble_sgl.global_sched.cost import CostProfile
from preble_sgl.global_sched.eviction import WorkerCache
from preble_sgl.global_sched.node import Match, Node


class WorkerView(Protocol):
    """The load of one worker; see `worker.py` for what each number means."""

    @property
    def worker_id(self) -> WorkerId: ...
    @property
    def profile(self) -> CostProfile: ...
    @property
    def cache(self) -> WorkerCache: ...
    @property
    def num_bound(self) -> int: ...
    @property
    def num_foreign(self) -> int: ...
    @property
    def pending_prefill_tokens(self) -> int: ...
    @property
    def expected_output_len(self) -> float: ...
    @property
    def outstanding_s(self) -> float: ...
    @property
    def prefill_wait_s(self) -> float: ...
    @property
    def backlog_s(self) -> float: ...
    @property
    def num_recent(self) -> int: ...
    @property
    def recent_prefill_s(self) -> float: ...
    @property
    def recent_decode_s(self) -> float: ...
    @property
    def recent_s(self) -> float: ...


class TreeView(Protocol):
    """What a policy may ask the prefix tree."""

    def free_tokens(self, worker_id: WorkerId, /) -> int: ...
    def used_tokens(self, worker_id: WorkerId, /) -> int: ...
    def eviction_candidates(self, worker_id: WorkerId, need_len: int, /) -> Sequence[Node]: ...


@dataclass(frozen=True, slots=True)
class FleetView:
    """The fleet at one instant. `workers`: two or more that may take the request, in the order of their ids.

    `future`: tokens that a worker has of the prefixes which the request's program will use later; only known
    for a planned program that is not open yet.
    """

    workers: Sequence[WorkerView]
    tree: TreeView
    now: float
    rng: random.Random
    future: Mapping[WorkerId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """The worker a policy picked and why. `costs`: of each worker it weighed, in the policy's unit."""

    worker_id: WorkerId
    reason: PlacementReason
    costs: Mapping[WorkerId, float] = field(default_factory=dict)


class Policy(Protocol):
    """Picks the worker of each request."""

    @property
    def name(self) -> str:
        """The name in the registry."""

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Pick one of `fleet.workers` for `request`, whose cached prefix on each worker `match` tells."""


@runtime_checkable
class Observer(Protocol):
    """A policy that also wants to hear what became of its decisions.

    A policy that has these methods is told. The worker named is the one that the request is on: it may be
    another than the policy picked, if the scheduler has moved the request since, and the request may be one
    that the policy never saw, because a fleet of one worker asks no policy. `choose` may see a request again.
    `now` never runs backwards.
    """

    def on_first_token(
        self, request_id: RequestId, worker_id: WorkerId, queueing_s: float, now: float
    ) -> None:
        """Learn that a prompt is computed, `queueing_s` after its submission. Once, before the finish."""

    def on_finish(
        self, request_id: RequestId, worker_id: WorkerId, cached_tokens: int, output_len: int, now: float
    ) -> None:
        """Learn that a request ended well, and what its runtime reported."""

    def on_cancel(self, request_id: RequestId, worker_id: WorkerId, now: float, failed: bool) -> None:
        """Learn that a request left its worker before its end: it failed there, was given up or is moved."""

    def on_worker_gone(self, worker_id: WorkerId) -> None:
        """Learn that a worker and all that it had is lost; its id may come back with an empty cache."""
