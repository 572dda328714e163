"""power_of_two: of two workers drawn at random, the one with fewer unfinished requests.

Two choices instead of one bring the expected longest queue from O(log n / log log n) down to O(log log n)
(Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 2001). The SGLang gateway
has the same policy (sgl-model-gateway, `policies/power_of_two.rs`).
"""

from operator import attrgetter

from preble_sgl.core import Request
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.protocol import Decision, FleetView


class PowerOfTwo:
    """Compares two distinct workers. Ties go to the one drawn first."""

    name = "power_of_two"

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Pick the lighter of two. O(1). Costs are unfinished requests."""
        drawn = fleet.rng.sample(fleet.workers, 2)
        chosen = min(drawn, key=attrgetter("num_bound"))
        costs = {worker.worker_id: float(worker.num_bound) for worker in drawn}
        return Decision(chosen.worker_id, "power_of_two", costs)
