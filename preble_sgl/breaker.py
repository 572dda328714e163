"""Leave a runtime alone that answers, but fails at whatever it is asked (a circuit breaker per worker)."""

from preble_sgl.core import RequestId, WorkerId

MOST_IN_A_ROW = 3
"""Different requests: one alone may be what makes any runtime fail."""
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0


class Breaker:
    """Counts the requests at which each worker failed since it last did one well."""

    def __init__(self) -> None:
        self._failed: dict[WorkerId, set[RequestId]] = {}
        self._num_pauses: dict[WorkerId, int] = {}

    def failed(self, worker_id: WorkerId, request_id: RequestId) -> float | None:
        """Count a failure; return for how many seconds to leave the worker alone, or None.

        One that has just been left alone is so again, for twice as long, when it fails at its first request.
        """
        failed = self._failed.setdefault(worker_id, set())
        failed.add(request_id)
        num_pauses = self._num_pauses.get(worker_id, 0)
        if len(failed) < (1 if num_pauses else MOST_IN_A_ROW):
            return None
        del self._failed[worker_id]
        self._num_pauses[worker_id] = num_pauses + 1
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**num_pauses)

    def succeeded(self, worker_id: WorkerId) -> None:
        """Forget a worker's failures."""
        if self._failed or self._num_pauses:
            self._failed.pop(worker_id, None)
            self._num_pauses.pop(worker_id, None)
