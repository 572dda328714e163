"""cache_aware: the rule of the SGLang gateways. Follow the cache while queues are even, else the queue.

- **balance**: if the fleet is out of balance (the longest queue exceeds the shortest by more than
  BALANCE_ABS requests *and* by more than the factor BALANCE_REL), the worker with the shortest queue;
- **exploit**: else, if more than CACHE_THRESHOLD of the prompt is cached on some worker, the one with the
  longest match;
- **explore**: else the worker with the shortest queue.

Equal matches and equal queues go to the fewest unfinished requests, then to the smallest cache, then to the
first id.

Source: sgl-model-gateway (sglang-router), `policies/cache_aware.rs`. Its header and its first versions
explore by the smallest tree, its present code by the shortest queue; here the queue decides and the tree
breaks the tie. The thresholds are those of its launcher (`sglang_router/router_args.py`), which are what
its users get; the library underneath defaults to 0.5, 32 and 1.0001, later 1.1. The gateway guesses each
cache from the requests it sent, as text; here the fleet's tree says what is cached, in tokens.
"""

from preble_sgl.core import Request
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.protocol import Decision, FleetView

CACHE_THRESHOLD = 0.3
"""Share of the prompt that must be cached for the cache to decide."""

BALANCE_ABS = 64
"""Requests by which the longest queue may exceed the shortest."""

BALANCE_REL = 1.5
"""Factor by which it may exceed it."""


class CacheAware:
    """Three thresholds and no state."""

    name = "cache_aware"

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Balance, exploit or explore. O(workers). Costs are unfinished requests."""
        costs = {worker.worker_id: float(worker.num_bound) for worker in fleet.workers}
        by_queue = sorted(costs, key=lambda worker_id: (costs[worker_id], fleet.tree.used_tokens(worker_id)))
        if _is_imbalanced(costs[by_queue[0]], costs[by_queue[-1]]):
            return Decision(by_queue[0], "balance", costs)
        best = max(by_queue, key=match.len_on)
        if match.len_on(best) > CACHE_THRESHOLD * len(request.prompt):
            return Decision(best, "exploit", costs)
        return Decision(by_queue[0], "explore", costs)


def _is_imbalanced(shortest: float, longest: float) -> bool:
    return longest - shortest > BALANCE_ABS and longest > BALANCE_REL * shortest
