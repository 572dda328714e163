"""least_load: the worker with the least outstanding work, caches ignored.

Load is in worker seconds: for each unfinished request of the worker the prefill it still needs, and one
output of the length that the worker's requests usually have. A long prompt weighs more than a short one, and
a fast worker takes more than a slow one.
"""

from preble_sgl.core import Request
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.protocol import Decision, FleetView


class LeastLoad:
    """Compares outstanding seconds. Ties go to the first id."""

    name = "least_load"

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Pick the worker with the fewest outstanding seconds. O(workers)."""
        costs = {worker.worker_id: worker.outstanding_s for worker in fleet.workers}
        return Decision(min(costs, key=costs.__getitem__), "least_load", costs)
