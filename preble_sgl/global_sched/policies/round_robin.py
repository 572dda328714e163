"""round_robin: each worker in turn, in the order of their ids, whatever the request."""

from preble_sgl.core import Request, WorkerId
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.protocol import Decision, FleetView


class RoundRobin:
    """Remembers the worker it took last, so that workers may come and go without upsetting the turn."""

    name = "round_robin"

    def __init__(self) -> None:
        self._last = WorkerId("")

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Pick the first worker behind the last one. O(workers)."""
        ids = [worker.worker_id for worker in fleet.workers]
        self._last = next((worker_id for worker_id in ids if worker_id > self._last), ids[0])
        return Decision(self._last, "round_robin")
