"""dynamo_linear: the least weighted sum of prefill and decode blocks, as NVIDIA Dynamo's KV router.

    cost(i) = overlap_weight · prefill_blocks(i) + decode_blocks(i)

- prefill_blocks: prompt tokens that i has still to prefill, with those of this prompt, over BLOCK_LEN;
- decode_blocks: the distinct full blocks of the prompts of i's unfinished requests, this one's included. A
  block that two of them share counts once. Generated tokens do not count, as by Dynamo's default.

At temperature 0 the least cost wins and ties are drawn; above it worker i is drawn with a weight of
exp(-(cost - min) / ((max - min) · temperature)).

Sources: docs.nvidia.com/dynamo, "Routing Concepts"; ai-dynamo/dynamo, `lib/kv-router/src/scheduling/
selector/default.rs` (cost, softmax, drawn ties) and its defaults, weight 1 and temperature 0. Like Dynamo's
slot tracker, the policy remembers the blocks of each unfinished request, and so needs to hear of their ends.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import exp

from preble_sgl.core import Request, RequestId, WorkerId
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.protocol import Decision, FleetView, WorkerView

BLOCK_LEN = 16
"""Tokens per block: vLLM's. Both terms are in blocks, so it matters only where blocks are cut."""


@dataclass(frozen=True, slots=True)
class Placed:
    """An unfinished request: its worker and its prompt's blocks."""

    worker_id: WorkerId
    blocks: tuple[bytes, ...]


class DynamoLinear:
    """Cost in blocks. Owns the multiset of active blocks of each worker. An `Observer`."""

    name = "dynamo_linear"

    def __init__(self, *, overlap_weight: float = 1.0, temperature: float = 0.0) -> None:
        self._overlap_weight = overlap_weight
        self._temperature = temperature
        self._placed: dict[RequestId, Placed] = {}
        self._active: dict[WorkerId, Counter[bytes]] = {}

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Pick the least cost, or draw by cost. O(prompt + workers · blocks of the prompt)."""
        self._free(request.request_id)
        blocks = prompt_blocks(request)
        costs = {
            worker.worker_id: self._overlap_weight * _prefill_blocks(worker, request, match)
            + self._decode_blocks(worker.worker_id, blocks)
            for worker in fleet.workers
        }
        chosen = fleet.rng.choices(list(costs), _weights(costs, self._temperature))[0]
        self._placed[request.request_id] = Placed(chosen, blocks)
        self._active.setdefault(chosen, Counter()).update(blocks)
        return Decision(chosen, "least_cost", costs)

    def on_first_token(
        self, request_id: RequestId, worker_id: WorkerId, queueing_s: float, now: float
    ) -> None:
        """Do nothing: what is still to prefill is the worker's own count."""

    def on_finish(
        self, request_id: RequestId, worker_id: WorkerId, cached_tokens: int, output_len: int, now: float
    ) -> None:
        """Free the request's blocks."""
        self._free(request_id)

    def on_cancel(self, request_id: RequestId, worker_id: WorkerId, now: float, failed: bool) -> None:
        """Free the request's blocks."""
        self._free(request_id)

    def on_worker_gone(self, worker_id: WorkerId) -> None:
        """Forget the worker and its requests. O(unfinished requests)."""
        self._active.pop(worker_id, None)
        self._placed = {rid: placed for rid, placed in self._placed.items() if placed.worker_id != worker_id}

    def _decode_blocks(self, worker_id: WorkerId, blocks: tuple[bytes, ...]) -> int:
        active: Mapping[bytes, int] = self._active.get(worker_id, {})
        return len(active) + sum(block not in active for block in blocks)

    def _free(self, request_id: RequestId) -> None:
        placed = self._placed.pop(request_id, None)
        if placed is None:
            return
        active = self._active[placed.worker_id]
        active.subtract(placed.blocks)
        for block in placed.blocks:
            if not active[block]:
                del active[block]


def prompt_blocks(request: Request) -> tuple[bytes, ...]:
    """Return one hash per full block of the prompt, each over the namespace and all tokens up to its end."""
    prefix = blake2b(request.namespace.encode() + b"\0", digest_size=8)
    blocks = []
    for start in range(0, len(request.prompt) - BLOCK_LEN + 1, BLOCK_LEN):
        prefix.update(request.prompt[start : start + BLOCK_LEN].tobytes())
        blocks.append(prefix.digest())
    return tuple(blocks)


def _prefill_blocks(worker: WorkerView, request: Request, match: Match) -> float:
    missed_len = len(request.prompt) - match.len_on(worker.worker_id)
    return (worker.pending_prefill_tokens + missed_len) / BLOCK_LEN


def _weights(costs: Mapping[WorkerId, float], temperature: float) -> list[float]:
    """Return how likely each worker is to be drawn, up to a common factor."""
    least, spread = min(costs.values()), max(costs.values()) - min(costs.values())
    if not spread or not temperature:
        return [float(cost == least) for cost in costs.values()]
    return [exp((least - cost) / (spread * temperature)) for cost in costs.values()]
