"""The window H: which visits still count as recent.

One queue for the whole fleet, in the order in which visits began. A visit leaves when it is H seconds old,
or, if it is still running then, when it ends: work in progress is never forgotten, and a request that ends
after its time is an ordinary case. Amortised O(path) per visit.
"""

from collections import deque
from collections.abc import Sequence

from preble_sgl.core import WorkerId
from preble_sgl.global_sched.node import Node
from preble_sgl.global_sched.radix_tree import RadixTree
from preble_sgl.global_sched.worker import Visit, Worker


class Window:
    """The recent visits; keeps the recent sums of the workers and of the tree's nodes."""

    __slots__ = ("_horizon_s", "_tree", "visits")

    def __init__(self, horizon_s: float, tree: RadixTree) -> None:
        self._horizon_s = horizon_s
        self._tree = tree
        self.visits: deque[Visit] = deque()

    def add(self, visit: Visit) -> None:
        """Begin to count a visit; its worker has admitted it already."""
        self.visits.append(visit)
        self._tree.count_recent(visit.tail, visit.worker.worker_id)

    def extend(self, visit: Visit, tail: Node) -> None:
        """Let a visit count for a longer prefix: its prompt and what it generated."""
        if visit.is_recent:
            self._tree.count_recent(tail, visit.worker.worker_id, above=visit.tail)
        visit.tail = tail

    def advance(self, now: float) -> None:
        """Drop what is too old."""
        horizon = now - self._horizon_s
        while self.visits and self.visits[0].bound_at < horizon:
            visit = self.visits.popleft()
            if visit.phase == "done":
                self.drop(visit)
            else:
                visit.is_overdue = True

    def close(self, visit: Visit) -> None:
        """Note that a visit is done."""
        if visit.is_overdue:
            self.drop(visit)

    def drop(self, visit: Visit) -> None:
        """Stop counting a visit, whatever its age."""
        if visit.is_recent:
            visit.worker.leave_window(visit)
            self._tree.discount_recent(visit.tail, visit.worker.worker_id)

    def recent(self, worker: Worker, unfinished: Sequence[Visit]) -> list[Visit]:
        """Return the visits to a worker that count: the young ones and the unfinished ones. O(visits)."""
        overdue = [visit for visit in unfinished if visit.is_overdue]
        return overdue + [visit for visit in self.visits if visit.worker is worker and visit.is_recent]

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Drop all visits to a worker that is gone. O(visits)."""
        gone = [visit for visit in self.visits if visit.worker.worker_id == worker_id and visit.is_recent]
        for visit in gone:
            visit.worker.leave_window(visit)
        self.visits = deque(visit for visit in self.visits if visit.worker.worker_id != worker_id)
