"""consistent_hash: the start of the prompt decides the worker, by a hash ring with bounded loads.

Each worker stands at many points of a ring, each prompt at one. A prompt belongs to the first worker
clockwise of it; if that one is full, to the next one that is not, so that the overflow of a prefix lands on
the same neighbours every time. A worker is full at ceil(c · m / n) unfinished requests (`bounded_load.py`).
When a worker joins or leaves, only the prompts move that it takes over or had: about 1/n of them.

What is hashed is the namespace and the first PREFIX_LEN tokens. No cache is looked at: prompts with a common
start of that length share a worker however they go on, prompts that differ earlier share none.

Sources: Karger et al., STOC 1997 (the ring); Mirrokni et al., arXiv 1608.01350 (the bound). The SGLang
gateway has the combination as `prefix_hash` (sgl-model-gateway, `policies/prefix_hash.rs`), which sends the
overflow to the least loaded worker and not along the ring.
"""

from bisect import bisect
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from preble_sgl.core import Request, WorkerId
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.bounded_load import max_requests
from preble_sgl.global_sched.policies.protocol import Decision, FleetView

PREFIX_LEN = 256
"""Tokens hashed, the gateway's default: longer than a chat template's preamble, shorter than documents."""

LOAD_FACTOR = 1.25
"""c: the gateway's default too. Nearer to 1 balances more, and scatters prefixes more."""

POINTS_PER_WORKER = 160
"""Points of one worker on the ring; the shares of the ring then differ by about 1/sqrt(160) = 8 %."""


class ConsistentHash:
    """Keeps the ring of the workers it saw last; the ring is a function of their ids alone."""

    name = "consistent_hash"

    def __init__(self) -> None:
        self._ids: list[WorkerId] = []
        self._ring: list[tuple[int, WorkerId]] = []

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Walk the ring to the first worker with room. O(log points + workers), O(points) after a change.

        Costs are unfinished requests.
        """
        costs = {worker.worker_id: float(worker.num_bound) for worker in fleet.workers}
        limit = max_requests(fleet.workers, LOAD_FACTOR)
        owners = self._clockwise(_request_point(request), list(costs))
        owner = next(owners)
        if costs[owner] < limit:
            return Decision(owner, "affinity", costs)
        return Decision(next(other for other in owners if costs[other] < limit), "overflow", costs)

    def _clockwise(self, point: int, ids: list[WorkerId]) -> Iterator[WorkerId]:
        """Yield the worker of each point of the ring, from the first behind `point` once around."""
        if ids != self._ids:
            self._ids, self._ring = ids, _ring(ids)
        start = bisect(self._ring, (point, WorkerId("")))
        for index in range(len(self._ring)):
            yield self._ring[(start + index) % len(self._ring)][1]


def _ring(ids: Sequence[WorkerId]) -> list[tuple[int, WorkerId]]:
    return sorted(
        (_point(f"{worker_id}#{index}".encode()), worker_id)
        for worker_id in ids
        for index in range(POINTS_PER_WORKER)
    )


def _request_point(request: Request) -> int:
    return _point(request.namespace.encode() + b"\0" + request.prompt[:PREFIX_LEN].tobytes())


def _point(key: bytes) -> int:
    """Return a 64-bit point that is the same in every process."""
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")
