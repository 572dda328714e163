"""lmetric: the least product of prefill tokens and batch size.

    score(i) = (prefill tokens pending on i + tokens of the prompt missed on i) · (requests of i + 1)

The first factor says how soon the first token comes, the second how much decoding it disturbs. In a sum the
two need a weight that must be tuned; in a product any weight cancels when workers are compared.

Source: Zhang et al., "Simple is Better: Multiplication May Be All You Need for LLM Request Scheduling", OSDI
2026, arXiv 2603.15202. The paper multiplies new prefill tokens and batch size; that pending prefill counts,
that the request counts in the batch (else an idle worker scores 0 whatever it must prefill) and that ties are
drawn are as in AIBrix (`algorithms/l_metric_local.go`).
"""

from preble_sgl.core import Request, WorkerId
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.protocol import Decision, FleetView


class LMetric:
    """One product per worker. Ties are drawn by the fleet's rng."""

    name = "lmetric"

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Pick the least score. O(workers). Costs are in tokens times requests."""
        costs: dict[WorkerId, float] = {}
        for worker in fleet.workers:
            missed_len = len(request.prompt) - match.len_on(worker.worker_id)
            prefill_tokens = worker.pending_prefill_tokens + missed_len
            costs[worker.worker_id] = float(prefill_tokens * (worker.num_bound + 1))
        least = min(costs.values())
        tied = [worker_id for worker_id, cost in costs.items() if cost == least]
        return Decision(fleet.rng.choice(tied), "least_cost", costs)
