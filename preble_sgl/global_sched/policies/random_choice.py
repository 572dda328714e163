"""random: any worker, each with the same chance, whatever the request."""

from preble_sgl.core import Request
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.protocol import Decision, FleetView


class RandomChoice:
    """Draws once from the fleet's rng per request."""

    name = "random"

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Pick any worker. O(1)."""
        return Decision(fleet.rng.choice(fleet.workers).worker_id, "random")
